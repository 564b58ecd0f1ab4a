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

// boundPorts has a socket for each port of the host that leads to a container of Docker's. The socket is bound to the port,
// and nothing listens at it. Without the socket, the engine would give the same port to a container of its own bridge
// too. No error would say so, and nobody would reach that container at the port. When the plugin ends, its sockets close.
// When it starts, it binds them again.
//
// The lock is also held while published ports change in the kernel. Otherwise a round could bind a port that was taken
// back a moment ago.
type boundPorts struct {
	sync.Mutex
	sockets map[string]map[bridge.PublishedPort]int // by owner: the file descriptor of each port's socket
}

// bindOwner binds the owner's ports, and closes the sockets of the ports that the owner has no more. If a port cannot be
// bound, bindOwner goes on with the others, and the error names the port. The caller holds the lock.
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

// bindPort makes the socket of a port. The socket has no SO_REUSEADDR, so nobody else can bind to the port. A datagram may
// reach the socket by a way that does not lead to the container. The socket has the smallest buffer, and nobody reads it.
func bindPort(p bridge.PublishedPort) (fd int, err error) {
	kind := unix.SOCK_STREAM
	if p.Proto == "udp" {
		kind = unix.SOCK_DGRAM
	}
	if fd, err = unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, err
	}
	addr := &unix.SockaddrInet4{Port: int(p.HostPort)}
	if p.HostAddr.IsValid() {
		addr.Addr = p.HostAddr.As4()
	}
	if err = errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 0), unix.Bind(fd, addr)); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// BindPorts binds the published ports of all of Docker's containers, and closes all other sockets. After the plugin's start
// no port is bound, and a call that died halfway may have left the wrong ones.
func (d *Driver) BindPorts(ctx context.Context) error {
	d.ports.Lock()
	defer d.ports.Unlock()
	all, err := d.cfg.Host.Attachments(ctx)
	if err != nil {
		return err
	}
	gone := maps.Clone(d.ports.sockets)
	var errs []error
	for _, attached := range all {
		if strings.HasPrefix(attached.Owner, OwnerPrefix) {
			delete(gone, attached.Owner)
			errs = append(errs, d.ports.bindOwner(attached.Owner, attached.Ports))
		}
	}
	for owner := range gone {
		errs = append(errs, d.ports.bindOwner(owner, nil))
	}
	return errors.Join(errs...)
}
