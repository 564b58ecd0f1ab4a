// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/client"
)

// Address is that of a running container, by its name.
func (h Host) Address(name string) netip.Addr {
	h.T.Helper()
	c, err := h.inspect(name)
	if err != nil {
		h.T.Fatal(err)
	}
	for _, n := range c.NetworkSettings.Networks {
		if addr, err := netip.ParseAddr(n.IPAddress); err == nil {
			return addr
		}
	}
	h.T.Fatalf("%s on %s has no address", name, h.Name)
	return netip.Addr{}
}

// inspect asks the VM's engine for a container, as docker inspect does. The tests ask so often that its process would
// take a tenth of their CPU time.
func (h Host) inspect(name string) (c container.InspectResponse, err error) {
	engine, err := client.NewClientWithOpts(client.WithHost(fmt.Sprintf("unix:///proc/%d/root/run/docker.sock", h.PidOne())), client.WithAPIVersionNegotiation())
	if err != nil {
		return c, err
	}
	defer engine.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	defer cancel()
	return engine.ContainerInspect(ctx, name)
}
