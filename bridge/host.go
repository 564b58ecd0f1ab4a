// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"azurevnet/internal/statefile"
)

// Host is the network of the host, or of the namespace, that its methods are called
// in. The methods speak to the kernel from the calling thread and start no goroutine
// that does, so a caller that locked its thread into a namespace works on that one.
// Any number of Hosts, in any number of processes, may work on one host at once.
type Host struct {
	cfg Config

	// testHook is called before each named step, and an error that it returns is
	// that step's. It is nil outside tests.
	testHook func(step string) error
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

func (h *Host) beforeStep(step string) error {
	if h.testHook == nil {
		return nil
	}
	return h.testHook(step)
}

// path is a file of ours under <run>/azure-vnet.
func (h *Host) path(elem ...string) string {
	return filepath.Join(append([]string{h.cfg.Run, "azure-vnet"}, elem...)...)
}

// lockWait bounds the wait for the host's lock, for a caller that has more time. A call
// of CNI has 30 s: of 200 ADDs at once on a busy node, the last ones wait long.
const lockWait = 20 * time.Second

// lockHost holds the host's network alone: whoever reads it in order to change it holds
// the lock from the reading to the change. who is told to those who wait in vain. While
// it is held, only host.json's lock is taken, iptables' own, and at uninstall that of
// the leases.
func (h *Host) lockHost(ctx context.Context, who string) (unlock func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	unlock, err = statefile.Lock(ctx, h.path("bridge.lock"), who)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", who, err)
	}
	return unlock, nil
}

// sysctl is a setting below /proc/sys/net.
type sysctl struct{ name, value string }

// readSysctl returns "" for a setting that the kernel does not have.
func (h *Host) readSysctl(name string) string {
	is, _ := os.ReadFile(filepath.Join(h.cfg.Sysctl, name))
	return strings.TrimSpace(string(is))
}

// setSysctl writes s unless it stands. A setting that the kernel does not have, such
// as one of IPv6 where that is switched off, is success.
func (h *Host) setSysctl(s sysctl) error {
	if is := h.readSysctl(s.name); is == "" || is == s.value {
		return nil
	}
	if err := os.WriteFile(filepath.Join(h.cfg.Sysctl, s.name), []byte(s.value), 0); err != nil {
		return fmt.Errorf("set net.%s to %s: %w", strings.ReplaceAll(s.name, "/", "."), s.value, err)
	}
	return nil
}
