// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	cniversion "github.com/containernetworking/cni/pkg/version"

	"azurevnet/internal/cni"
)

const (
	confDir       = "/etc/cni/net.d"                    // where runtimes find lists of plugins, unless they are configured otherwise
	installedFile = "/var/lib/azure-vnet/cni.installed" // written by install-cni-plugin.sh: lines of a checksum and a path
	versionTime   = 2 * time.Second                     // for a plugin to tell its versions
)

// checkChained is an error if another plugin of the call's list is missing, or does not speak the CNI
// version that the runtime chose. A runtime calls STATUS of each plugin in turn. A plugin that does not
// know STATUS answers "missing containerID". This answer does not name the plugin, and the node's
// operator sees nothing else. checkChained skips a plugin that does not tell its versions.
func checkChained(ctx context.Context, c *cni.Call) error {
	list, path := findList(c)
	if list == nil {
		return nil
	}
	refuse := func(format string, args ...any) error {
		return types.NewError(types.ErrPluginNotAvailable, path+": "+fmt.Sprintf(format, args...), "")
	}
	for _, p := range list.Plugins {
		name := p.Network.Type
		program, err := invoke.FindInPath(name, filepath.SplitList(os.Getenv("CNI_PATH")))
		if err != nil {
			return refuse("its plugin %s is missing: %v: install it there, or take it out of the list", name, err)
		}
		info, err := askVersions(ctx, program)
		if err != nil || slices.Contains(info.SupportedVersions(), c.Conf.CNIVersion) {
			continue
		}
		return refuse("its plugin %s does not speak CNI %s, and so cannot tell its state: %s speaks %s: install a newer %s, or remove %s from the list's cniVersions",
			name, c.Conf.CNIVersion, program, strings.Join(info.SupportedVersions(), ", "), name, c.Conf.CNIVersion)
	}
	return nil
}

// askVersions asks a plugin which versions it speaks. If the plugin does not answer in time, askVersions kills it with
// all processes that it started, and does not wait for them.
func askVersions(ctx context.Context, program string) (cniversion.PluginInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, versionTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, program)
	cmd.Env = append(os.Environ(), "CNI_COMMAND=VERSION")
	cmd.Stdin = strings.NewReader(fmt.Sprintf(`{"cniVersion":%q}`, cniversion.Current()))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 100 * time.Millisecond
	out, err := cmd.Output()
	if err != nil {
		return nil, err
	}
	return new(cniversion.PluginDecoder).Decode(out)
}

// findList finds the call's list, and the list's file. The runtime gives a call only the entry of the
// called plugin. So findList takes the first list that has the network's name and the same entry. It finds
// no list if the runtime reads its lists from a directory that the installer did not find.
func findList(c *cni.Call) (list *libcni.NetworkConfigList, path string) {
	dirs := []string{confDir}
	record, _ := os.ReadFile(installedFile) // without it, azure-vnet was installed by other means
	for line := range strings.Lines(string(record)) {
		_, path, _ := strings.Cut(strings.TrimSpace(line), "  ")
		if filepath.Ext(path) == ".conflist" {
			dirs = append(dirs, filepath.Dir(path))
		}
	}
	mine := configuredKeys(c.Stdin)
	for _, dir := range dirs {
		paths, _ := libcni.ConfFiles(dir, []string{".conflist"})
		for _, path := range paths {
			if checkConflist(path) != nil {
				continue
			}
			list, err := libcni.NetworkConfFromFile(path)
			if err != nil || list.Name != c.Conf.Network {
				continue
			}
			if slices.ContainsFunc(list.Plugins, func(p *libcni.PluginConfig) bool { return reflect.DeepEqual(configuredKeys(p.Bytes), mine) }) {
				return list, path
			}
		}
	}
	return nil, ""
}

// configuredKeys returns the keys of a plugin's configuration, without those that libcni adds for STATUS.
func configuredKeys(conf []byte) map[string]any {
	var keys map[string]any
	_ = json.Unmarshal(conf, &keys) // this cannot fail: libcni or this call has parsed it before
	delete(keys, "name")
	delete(keys, "cniVersion")
	return keys
}
