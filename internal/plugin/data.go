// Copyright (c) The azure-vnet authors. MIT licence.

package plugin

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"azurevnet/driver"
)

// dataDir is where networks.json lies when this is no managed plugin.
const dataDir = "/var/lib/azure-vnet"

// inEngine is where an engine that is configured in no other way keeps this program.
const inEngine = "/var/lib/docker/plugins/*/rootfs/azure-vnet-plugin"

// errNoData is the error of status and uninstall, which then speak of no network.
var errNoData = errors.New("networks.json, which lists Docker's networks, is not found: no plugin has run since the boot, and no engine keeps one in /var/lib/docker. " +
	"If the engine keeps its files elsewhere, say where, with these words at the end of the command: " +
	"-data \"$(docker info -f '{{.DockerRootDir}}')/plugins/$(docker plugin inspect -f '{{.Id}}' azure-vnet:latest)/propagated-mount\". " +
	"If the plugin was removed, the file is gone with it")

// mount is a line of proc_pid_mountinfo(5), as far as it is used here.
type mount struct {
	device string // major:minor of the file system
	root   string // directory of the file system that is mounted
	point  string // where this process sees it
}

func parseMounts(mountinfo string) (all []mount) {
	plain := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	for line := range strings.Lines(mountinfo) {
		// id, parent, device, root, mount point
		if field := strings.Fields(line); len(field) > 4 {
			all = append(all, mount{field[2], plain.Replace(field[3]), plain.Replace(field[4])})
		}
	}
	return all
}

// place names a directory so that processes with different mounts find it, such as the plugin and a shell of
// the host. In every mount namespace, a mount of one directory has the same device and root.
type place struct {
	Device string `json:"device"` // major:minor of its file system
	Dir    string `json:"dir"`    // in that file system
}

// placeOf is the place of a directory. Its mount is that with the longest mount point that contains dir, and of equal
// mount points the last, which hides the earlier ones.
func placeOf(mounts []mount, dir string) (p place) {
	longest := -1
	for _, m := range mounts {
		below, ok := cutDir(dir, m.point)
		if ok && len(m.point) >= longest {
			longest, p = len(m.point), place{m.device, filepath.Join(m.root, below)}
		}
	}
	return p
}

// findPath is a path of the place, "" if no mount shows it.
func (p place) findPath(mounts []mount) string {
	for _, m := range mounts {
		below, ok := cutDir(p.Dir, m.root)
		if path := filepath.Join(m.point, below); ok && m.device == p.Device && placeOf(mounts, path) == p {
			return path
		}
	}
	return ""
}

// cutDir is path relative to dir. ok is false if path does not lie in dir.
func cutDir(path, dir string) (below string, ok bool) {
	below, ok = strings.CutPrefix(path, strings.TrimSuffix(dir, "/"))
	return below, ok && (below == "" || below[0] == '/')
}

// readMounts reads those of this process; none if they cannot be read.
func readMounts() []mount {
	mountinfo, _ := os.ReadFile("/proc/self/mountinfo")
	return parseMounts(string(mountinfo))
}

// placeFile is where a running plugin leaves the place of networks.json.
func placeFile(run string) string { return filepath.Join(run, "azure-vnet", "data.json") }

// writePlace writes placeFile for status and uninstall, which see the host's files at other paths.
func writePlace(p places) error {
	text, err := json.Marshal(placeOf(readMounts(), p.data))
	if err == nil {
		err = leave(placeFile(p.run), text)
	}
	if err != nil {
		return fmt.Errorf("leave word of where networks.json lies, for status: %w", err)
	}
	return nil
}

// leave writes a file for other processes, whole or not at all.
func leave(path string, text []byte) error {
	err := os.MkdirAll(filepath.Dir(path), 0o755)
	if err == nil {
		err = os.WriteFile(path+".tmp", text, 0o600)
	}
	if err == nil {
		err = os.Rename(path+".tmp", path)
	}
	return err
}

// findData is the directory of networks.json. It is the first of these: the one that -data names, the one whose place a
// plugin recorded since the boot, one that has the file, and one where an engine or this program would keep the file.
// The file may be missing: then there are no networks, or the plugin was removed since the boot.
func findData(p places) (string, error) {
	if p.data != "" {
		return p.data, nil
	}
	var left place
	if text, err := os.ReadFile(placeFile(p.run)); err == nil {
		_ = json.Unmarshal(text, &left) // only an edit by hand tears it: then the directory is sought elsewhere
	}
	recorded := left.findPath(readMounts())
	if _, err := os.Stat(recorded); err == nil {
		return recorded, nil
	}
	programs, _ := filepath.Glob(inEngine) // the pattern is right
	if self, err := os.Executable(); err == nil && filepath.Base(filepath.Dir(self)) == "rootfs" {
		programs = append([]string{self}, programs...) // docs/docker.md runs the program there
	}
	var all []string
	for _, program := range programs {
		all = append(all, filepath.Join(filepath.Dir(program), "../propagated-mount"))
	}
	for _, dir := range append(all, dataDir) {
		if _, err := os.Stat(driver.NetworksFile(dir)); err == nil {
			return dir, nil
		}
	}
	for _, dir := range append(all, recorded) {
		if dir != "" {
			return dir, nil
		}
	}
	return "", errNoData
}
