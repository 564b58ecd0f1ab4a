// Copyright (c) The azure-vnet authors. MIT licence.

package plugin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/filters"
	"github.com/docker/docker/api/types/network"
	"github.com/docker/docker/client"
)

const (
	compareEvery = 30 * time.Second       // from one comparison of the networks to the next
	compareTime  = 10 * time.Second       // bounds one comparison, since an engine that starts does not answer
	nameTime     = 300 * time.Millisecond // bounds the wait for a name
)

// dockerd is the engine that runs this plugin. The engine may answer nobody while it waits for the plugin's answer to a
// call. So the plugin asks it in the background. Within a call it asks for names only, and waits for nameTime at most.
type dockerd struct {
	socket string // of the engine's API
	plugin string // the engine's id of this plugin; empty: no engine manages it
}

// propagated matches the directory in which an engine keeps the propagated mount of a plugin.
var propagated = regexp.MustCompile(`/plugins/([0-9a-f]{64})/propagated-mount$`)

// pluginID returns the id under which an engine runs this process. The root of the mount at data, the propagated mount,
// has the id in its path. pluginID returns "" if no engine runs this process as a plugin.
func pluginID(mounts []mount, data string) string {
	for _, m := range mounts {
		if found := propagated.FindStringSubmatch(m.root); found != nil && m.point == data {
			return found[1]
		}
	}
	return ""
}

// findDockerd returns the engine that runs this process. ok is false if no engine runs it as a plugin.
func findDockerd(p places) (engine dockerd, ok bool) {
	id := pluginID(readMounts(), p.data)
	return dockerd{socket: filepath.Join(p.run, "docker.sock"), plugin: id}, id != ""
}

// propagatedMount returns the directory of the plugin's propagated mount on the host. It is an expression for the
// host's shell, because only the engine knows where it keeps its files. It is "" if no engine manages the plugin.
func (e dockerd) propagatedMount() string {
	if e.plugin == "" {
		return ""
	}
	return "$(docker info -f '{{.DockerRootDir}}')/plugins/" + e.plugin + "/propagated-mount"
}

// errNoEngine is the error if the engine does not listen at the usual path, or another engine does.
var errNoEngine = errors.New("the engine that runs this plugin does not listen there")

// dialEngine returns a client of the engine. The caller closes it.
func (e dockerd) dialEngine() (*client.Client, error) {
	if _, err := os.Stat(e.socket); errors.Is(err, fs.ErrNotExist) {
		return nil, errNoEngine
	}
	return client.NewClientWithOpts(client.WithHost("unix://"+e.socket), client.WithAPIVersionNegotiation())
}

// Container returns the name of the running container that has the endpoint, and the name of the endpoint's network. It
// implements driver.Engine.
func (e dockerd) Container(ctx context.Context, endpoint string) (name, network string, err error) {
	ctx, cancel := context.WithTimeout(ctx, nameTime)
	defer cancel()
	all, err := e.listRunning(ctx)
	if err != nil {
		return "", "", err
	}
	for _, c := range all {
		for network, s := range c.NetworkSettings.Networks {
			if s.EndpointID == endpoint {
				return strings.TrimPrefix(c.Names[0], "/"), network, nil
			}
		}
	}
	return "", "", fmt.Errorf("no running container has endpoint %.12s", endpoint)
}

// listRunning lists the running containers that have a name and networks. The engine answers this question even while
// it starts a container.
func (e dockerd) listRunning(ctx context.Context) ([]container.Summary, error) {
	docker, err := e.dialEngine()
	if err != nil {
		return nil, err
	}
	defer docker.Close()
	all, err := docker.ContainerList(ctx, container.ListOptions{})
	if err != nil {
		return nil, err
	}
	for _, c := range all {
		if c.NetworkSettings != nil {
			maps.DeleteFunc(c.NetworkSettings.Networks, func(_ string, s *network.EndpointSettings) bool { return s == nil })
		}
	}
	return slices.DeleteFunc(all, func(c container.Summary) bool { return c.NetworkSettings == nil || len(c.Names) == 0 }), nil
}

// Network returns the name of the network with the id. It implements driver.Engine.
func (e dockerd) Network(ctx context.Context, id string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, nameTime)
	defer cancel()
	docker, err := e.dialEngine()
	if err != nil {
		return "", err
	}
	defer docker.Close()
	all, err := docker.NetworkList(ctx, network.ListOptions{Filters: filters.NewArgs(filters.Arg("id", id))})
	if err != nil {
		return "", err
	}
	for _, n := range all {
		if n.ID == id {
			return n.Name, nil
		}
	}
	return "", fmt.Errorf("the engine has no network %.12s", id)
}

// listNetworks returns the set of the ids of all networks of the engine, of all drivers. It is an error if the engine
// does not run this plugin, or if its list is not complete.
func (e dockerd) listNetworks(ctx context.Context) (map[string]bool, error) {
	docker, err := e.dialEngine()
	if err != nil {
		return nil, err
	}
	defer docker.Close()
	// An engine that does not run this plugin has other networks, and its list would have ours forgotten.
	if _, _, err := docker.PluginInspectWithRaw(ctx, e.plugin); errdefs.IsNotFound(err) {
		return nil, errNoEngine
	} else if err != nil {
		return nil, err
	}
	all, err := docker.NetworkList(ctx, network.ListOptions{})
	if err != nil {
		return nil, err
	}
	ids, names := map[string]bool{}, map[string]bool{}
	for _, n := range all {
		ids[n.ID], names[n.Name] = true, true
	}
	if !names["none"] || !names["host"] {
		return nil, fmt.Errorf("it lists %d networks and not the two that every engine has: the list is not whole", len(all))
	}
	return ids, nil
}

// namesByAddress returns the names of the running containers on the networks, by address. If the engine does not answer
// in time, it returns none, and status shows the addresses without names.
func (e dockerd) namesByAddress(ctx context.Context, networks []string) map[netip.Addr]string {
	names := map[netip.Addr]string{}
	ctx, cancel := context.WithTimeout(ctx, nameTime)
	defer cancel()
	all, err := e.listRunning(ctx)
	if err != nil {
		return names
	}
	for _, c := range all {
		for _, s := range c.NetworkSettings.Networks {
			if addr, err := netip.ParseAddr(s.IPAddress); err == nil && slices.Contains(networks, s.NetworkID) {
				names[addr] = strings.TrimPrefix(c.Names[0], "/")
			}
		}
	}
	return names
}

// compareNetworks forgets the networks that the engine removed while the plugin was away. It compares every 30 s, until
// ctx is done.
func (r *reconciler) compareNetworks(ctx context.Context, e dockerd) {
	for ctx.Err() == nil {
		forgotten, err := r.compareNetworksOnce(ctx, e)
		for _, id := range forgotten {
			r.log.WithField("network", shortID(id)).Warn("forgot a network that the engine removed while the plugin was away")
		}
		if err != nil {
			r.log.WithField("socket", e.socket).WithError(err).Debug("networks are not compared with the engine's")
		}
		select {
		case <-ctx.Done():
		case <-time.After(compareEvery):
		}
	}
}

// compareNetworksOnce compares once, and returns the ids of the networks that were forgotten.
func (r *reconciler) compareNetworksOnce(ctx context.Context, e dockerd) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, compareTime)
	defer cancel()
	listed, err := e.listNetworks(ctx)
	if err != nil {
		return nil, err
	}
	return r.networks.ForgetUnlisted(ctx, listed)
}
