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
	"azurevnet/internal/statefile"
)

// dataDir is the directory of networks.json if no engine manages this program as a plugin.
const dataDir = "/var/lib/azure-vnet"

// inEngine matches this program where an engine keeps it, unless the engine is configured otherwise.
const inEngine = "/var/lib/docker/plugins/*/rootfs/azure-vnet-plugin"

// errNoData is the error of status and uninstall if networks.json is not found. They then say nothing of networks.
var errNoData = errors.New("networks.json, which lists Docker's networks, is not found: no plugin has run since the boot, and no engine keeps one in /var/lib/docker. " +
	"If the engine keeps its files elsewhere, say where, with these words at the end of the command: " +
	"-data \"$(docker info -f '{{.DockerRootDir}}')/plugins/$(docker plugin inspect -f '{{.Id}}' azure-vnet:latest)/propagated-mount\". " +
	"If the plugin was removed, the file is gone with it")

// mount is a line of /proc/self/mountinfo: see proc_pid_mountinfo(5).
type mount struct {
	device string // major:minor of the file system
	root   string // directory of the file system that is mounted
	point  string // where this process sees it
}

// parseMounts reads a mountinfo file.
func parseMounts(mountinfo string) (all []mount) {
	plain := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	for line := range strings.Lines(mountinfo) {
		// The fields are: id, parent, device, root, mount point, and others. A path may have another blank in it,
		// such as a no-break space, which the kernel does not escape.
		if field := strings.Split(strings.TrimSuffix(line, "\n"), " "); len(field) > 4 {
			all = append(all, mount{field[2], plain.Replace(field[3]), plain.Replace(field[4])})
		}
	}
	return all
}

// place names a directory so that processes with other mounts can find it, such as the plugin and a shell of the host.
// It works because all mounts of one file system have the same device, in every mount namespace.
type place struct {
	Device string `json:"device"` // major:minor of its file system
	Dir    string `json:"dir"`    // in that file system
}

// placeOf returns the place of a directory. The directory lies in the mount with the longest mount point that contains
// it. If two mounts have this mount point, the last one hides the other.
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

// findPath returns a path of the place. It is "" if no mount shows the place.
func (p place) findPath(mounts []mount) string {
	for _, m := range mounts {
		below, ok := cutDir(p.Dir, m.root)
		if path := filepath.Join(m.point, below); ok && m.device == p.Device && placeOf(mounts, path) == p {
			return path
		}
	}
	return ""
}

// cutDir returns path relative to dir. ok is false if path does not lie in dir.
func cutDir(path, dir string) (below string, ok bool) {
	below, ok = strings.CutPrefix(path, strings.TrimSuffix(dir, "/"))
	return below, ok && (below == "" || below[0] == '/')
}

// readMounts reads the mounts of this process. If they cannot be read, there are none.
func readMounts() []mount {
	mountinfo, _ := os.ReadFile("/proc/self/mountinfo")
	return parseMounts(string(mountinfo))
}

// placeFile is the file to which a plugin that starts writes the place of networks.json.
func placeFile(run string) string { return filepath.Join(run, "azure-vnet", "data.json") }

// writePlace writes the place of networks.json for status and uninstall, which see the host's files at other paths.
func writePlace(p places) error {
	text, err := json.Marshal(placeOf(readMounts(), p.data))
	if err == nil {
		err = statefile.Replace(placeFile(p.run), text, 0o600)
	}
	if err != nil {
		return fmt.Errorf("leave word of where networks.json lies, for status: %w", err)
	}
	return nil
}

// findData returns the directory of networks.json. It takes the first of these directories:
//
//   - the one in the flag -data
//   - the one in data.json, which a plugin wrote since the boot
//   - one with the file in it
//   - the usual one of an engine, or of this program
//
// The file may be missing. Then there are no networks, or the plugin was removed since the boot.
func findData(p places) (string, error) {
	if p.data != "" {
		return p.data, nil
	}
	var written place
	if text, err := os.ReadFile(placeFile(p.run)); err == nil {
		_ = json.Unmarshal(text, &written) // if somebody damaged the file, the directory is sought elsewhere
	}
	recorded := written.findPath(readMounts())
	if _, err := os.Stat(recorded); err == nil {
		return recorded, nil
	}
	programs, _ := filepath.Glob(inEngine) // the pattern is valid, so this cannot fail
	if self, err := os.Executable(); err == nil && filepath.Base(filepath.Dir(self)) == "rootfs" {
		programs = append([]string{self}, programs...) // docs/docker.md has an operator run the program in the engine's directory
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
