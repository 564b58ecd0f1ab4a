// Copyright (c) The azure-vnet authors. MIT licence.

package host

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"

	"github.com/containernetworking/cni/libcni"

	"azurevnet/test"
)

// side is somebody whose containers come and go on a VM.
type side struct {
	name  string
	who   *test.Holders
	has   map[string]netip.Addr                 // by container
	start func(name string) (netip.Addr, error) // after an error, nothing of the container is left
	end   func(name string) error
}

// one has one container of three come or go, at random.
func (s *side) one(dice *rand.Rand) (name string, err error) {
	name = fmt.Sprintf("%s-%d", s.name, dice.IntN(3))
	if _, ok := s.has[name]; ok {
		return name, s.goes(name)
	}
	addr, err := s.start(name)
	if err == nil {
		s.who.Take(addr, name)
		s.has[name] = addr
	}
	return name, err
}

// goes ends a container.
func (s *side) goes(name string) error {
	s.who.Give(s.has[name]) // another may have it as soon as the engine or the plugin is told
	delete(s.has, name)
	return s.end(name)
}

// allGo ends all containers.
func (s *side) allGo() (err error) {
	for _, name := range slices.Sorted(maps.Keys(s.has)) {
		err = errors.Join(err, s.goes(name))
	}
	return err
}

// dockerSide is somebody who runs and ends containers on the network azure. If connects is true, one of them runs all the
// time, and is connected and disconnected.
func dockerSide(h test.Host, name string, who *test.Holders, connects bool) *side {
	runs := false // the container that is connected
	connected := func(container string) bool { return connects && strings.HasSuffix(container, "-0") }
	run := func(container string, arg ...string) error {
		_, err := h.Try(test.Client, append(append([]string{"run", "-d", "--init", "--name", container}, arg...), "busybox", "sleep", "100000")...)
		if err != nil {
			if _, bad := h.Try(test.Client, "rm", "-f", container); ignoreMissing(bad) != nil {
				return bad
			}
		}
		return err
	}
	return &side{
		name: name, who: who, has: map[string]netip.Addr{},
		start: func(container string) (addr netip.Addr, err error) {
			if !connected(container) {
				err = run(container, "--network", "azure")
			} else if !runs {
				err = run(container)
				runs = err == nil
			}
			if err == nil && connected(container) {
				_, err = h.Try(test.Client, "network", "connect", "azure", container)
			}
			if err != nil {
				return addr, err
			}
			out, err := h.Try(test.Client, "inspect", "-f", "{{.NetworkSettings.Networks.azure.IPAddress}}", container)
			if err != nil {
				return addr, err
			}
			return netip.ParseAddr(out)
		},
		end: func(container string) error {
			if connected(container) {
				_, err := h.Try(test.Client, "network", "disconnect", "azure", container)
				return err
			}
			_, err := h.Try(test.Client, "rm", "-f", container)
			return ignoreMissing(err)
		},
	}
}

// ignoreMissing turns the error of an engine that has no such container into nil.
func ignoreMissing(err error) error {
	if err != nil && strings.Contains(err.Error(), "No such container") {
		return nil
	}
	return err
}

// cniSide is a runtime that makes and ends pods of a network.
func cniSide(n test.Node, l *libcni.NetworkConfigList, name string, who *test.Holders) *side {
	end := func(pod string) error {
		rt := &libcni.RuntimeConf{ContainerID: pod, NetNS: "/run/netns/" + pod, IfName: "eth0"}
		if err := n.CNI.DelNetworkList(n.T.Context(), l, rt); err != nil {
			return err
		}
		_, err := n.Try("ip", "netns", "del", pod)
		return err
	}
	return &side{
		name: name, who: who, has: map[string]netip.Addr{},
		start: func(pod string) (netip.Addr, error) {
			if err := n.AddNetns(pod); err != nil {
				return netip.Addr{}, err
			}
			addr, _, err := n.TryAdd(l, &libcni.RuntimeConf{ContainerID: pod, NetNS: "/run/netns/" + pod, IfName: "eth0"})
			if err != nil {
				if bad := end(pod); bad != nil {
					return addr, bad
				}
			}
			return addr, err
		},
		end: end,
	}
}
