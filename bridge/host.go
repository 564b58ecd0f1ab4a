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

// Host is the network of the host, or of the namespace that its methods are called in. The methods speak to the
// kernel from the calling thread, and start no goroutine that does. So a caller that has locked its thread into
// a namespace works on that namespace. Any number of Hosts, in any number of processes, may work on one host at
// the same time.
type Host struct {
	cfg Config

	// testHook is called before each named step. If it returns an error, the step fails with it. Outside of
	// tests it is nil.
	testHook func(step string) error
}

// New returns the host that cfg describes. It reads and changes nothing.
func New(cfg Config) *Host {
	if cfg.Run == "" {
		cfg.Run = "/run"
	}
	if cfg.Sysctl == "" {
		cfg.Sysctl = "/proc/sys/net"
	}
	return &Host{cfg: cfg}
}

// beforeStep lets a test stop the caller before the named step, as a crash would.
func (h *Host) beforeStep(step string) error {
	if h.testHook == nil {
		return nil
	}
	return h.testHook(step)
}

// path returns the path of a file of ours, which is under <run>/azure-vnet.
func (h *Host) path(elem ...string) string {
	return filepath.Join(append([]string{h.cfg.Run, "azure-vnet"}, elem...)...)
}

// lockWait bounds the wait for the host's lock if the caller's ctx ends later. A CNI call has 30 s in all. Of
// 200 ADDs at once on a busy node, the last ones wait for long.
const lockWait = 20 * time.Second

// lockHost takes bridge.lock, which is exclusive: a call that changes the host's network reads, decides and changes
// under this lock. The file has the text of who; another call that waits in vain is told it. While the lock is held,
// only these locks may be taken: host.json's, that of the iptables programs, and at uninstall that of leases.json.
func (h *Host) lockHost(ctx context.Context, who string) (unlock func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	unlock, err = statefile.Lock(ctx, h.path("bridge.lock"), who)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", who, err)
	}
	return unlock, nil
}

// sysctl is a setting below /proc/sys/net. The name is a path, such as ipv4/ip_forward.
type sysctl struct{ name, value string }

// readSysctl returns the value of a setting, or "" if the kernel does not have the setting.
func (h *Host) readSysctl(name string) string {
	is, _ := os.ReadFile(filepath.Join(h.cfg.Sysctl, name))
	return strings.TrimSpace(string(is))
}

// setSysctl writes the value if the setting has another one. If the kernel does not have the setting, it does
// nothing: for example, a host without IPv6 has no setting of IPv6.
func (h *Host) setSysctl(s sysctl) error {
	if is := h.readSysctl(s.name); is == "" || is == s.value {
		return nil
	}
	if err := os.WriteFile(filepath.Join(h.cfg.Sysctl, s.name), []byte(s.value), 0); err != nil {
		return fmt.Errorf("set net.%s to %s: %w", strings.ReplaceAll(s.name, "/", "."), s.value, err)
	}
	return nil
}
