// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"os"
	"path/filepath"
	"strings"
)

// Host is the network of the host, or of the namespace, that its methods are
// called in: they speak to the kernel from the calling thread and start no
// goroutine that does, so a caller that locked its thread into a namespace
// works on that one. Any number of Hosts, in any number of processes, may work
// on one host at once.
type Host struct {
	cfg Config

	// step is called before each named step of a move, and an error it returns
	// is that step's: the seam through which tests break a move. Nil outside.
	step func(name string) error
}

// New returns the host that cfg describes. It touches nothing.
func New(cfg Config) *Host {
	if cfg.Run == "" {
		cfg.Run = "/run"
	}
	if cfg.Sysctl == "" {
		cfg.Sysctl = "/proc/sys/net"
	}
	return &Host{cfg: cfg}
}

// path is a file of ours under <run>/azure-vnet.
func (h *Host) path(elem ...string) string {
	return filepath.Join(append([]string{h.cfg.Run, "azure-vnet"}, elem...)...)
}

// setSysctl makes the file name below net/, such as ipv4/ip_forward, hold
// value, and reports whether it had to be written. The error is an *fs.PathError:
// fs.ErrNotExist where the kernel lacks the setting.
func (h *Host) setSysctl(name, value string) (changed bool, err error) {
	file := filepath.Join(h.cfg.Sysctl, name)
	is, err := os.ReadFile(file)
	if err != nil {
		return false, err
	}
	if strings.TrimSpace(string(is)) == value {
		return false, nil
	}
	return true, os.WriteFile(file, []byte(value), 0)
}
