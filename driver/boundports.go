// Copyright (c) The azure-vnet authors. MIT licence.

package driver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"azurevnet/bridge"
)

// boundPorts are sockets that are bound to the ports of the host that lead to containers of Docker's. Nothing listens
// at them. Without one, the engine would give the port to a container of its own bridge too, without a word, and
// nobody would reach that container there. The plugin's end closes them, and its start binds them again.
type boundPorts struct {
	sync.Mutex                                         // held by those who change what is published too, so that no round binds what was just taken back
	sockets    map[string]map[bridge.PublishedPort]int // by owner: the file descriptor of each port's socket
}

// bindOwner binds the owner's ports, and closes the sockets of those that it has no more. It goes on after an error, which
// names the ports that somebody else is bound to. The caller holds the lock.
func (h *boundPorts) bindOwner(owner string, ports []bridge.PublishedPort) error {
	has, wanted := h.sockets[owner], map[bridge.PublishedPort]int{}
	var errs []error
	for _, p := range ports {
		fd, ok := has[p]
		if delete(has, p); !ok {
			var err error
			if fd, err = bindPort(p); err != nil {
				errs = append(errs, fmt.Errorf("%s is published, and something else on this host is bound to that port: %w", p, err))
				continue
			}
		}
		wanted[p] = fd
	}
	for _, fd := range has {
		_ = unix.Close(fd)
	}
	if h.sockets == nil {
		h.sockets = map[string]map[bridge.PublishedPort]int{}
	}
	if h.sockets[owner] = wanted; len(wanted) == 0 {
		delete(h.sockets, owner)
	}
	return errors.Join(errs...)
}

// bindPort makes the socket. It has no SO_REUSEADDR, so nobody else can bind to the port; and what reaches it by a way that
// is not led to the container, it does not keep.
func bindPort(p bridge.PublishedPort) (fd int, err error) {
	kind := unix.SOCK_STREAM
	if p.Proto == "udp" {
		kind = unix.SOCK_DGRAM
	}
	if fd, err = unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, err
	}
	at := &unix.SockaddrInet4{Port: int(p.HostPort)}
	if p.HostAddr.IsValid() {
		at.Addr = p.HostAddr.As4()
	}
	if err = errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 0), unix.Bind(fd, at)); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// BindPorts binds what is published of Docker's containers: after the plugin's start, and where a call died halfway.
func (d *Driver) BindPorts(ctx context.Context) error {
	d.ports.Lock()
	defer d.ports.Unlock()
	all, err := d.cfg.Host.Attachments(ctx)
	if err != nil {
		return err
	}
	gone := maps.Clone(d.ports.sockets)
	var errs []error
	for _, at := range all {
		if strings.HasPrefix(at.Owner, OwnerPrefix) {
			delete(gone, at.Owner)
			errs = append(errs, d.ports.bindOwner(at.Owner, at.Ports))
		}
	}
	for owner := range gone {
		errs = append(errs, d.ports.bindOwner(owner, nil))
	}
	return errors.Join(errs...)
}
