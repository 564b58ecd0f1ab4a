// Copyright (c) The azure-vnet authors. MIT licence.

package vnetsim

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// cgroup is a directory of one cgroup hierarchy. A VM has one in each, which
// its cgroup namespace shows as the root: whatever an engine makes in the VM
// lies below and can be removed with it.
type cgroup struct {
	Mount  string // where the hierarchy is mounted, on the machine and in the VM
	FSType string // cgroup or cgroup2
	Opts   string // mount options that choose the hierarchy
	Dir    string // on the machine
}

// ownCgroups makes a directory for a VNet below the caller's own cgroup in
// every hierarchy, so that the caller's limits hold for the VMs.
func ownCgroups() (_ []cgroup, err error) {
	hierarchies, err := cgroupMounts()
	if err != nil {
		return nil, err
	}
	var made []cgroup
	defer func() {
		if err != nil {
			removeAll(cgroupDirs(made), 0)
		}
	}()
	name := ""
	for _, h := range hierarchies {
		if name == "" {
			h.Dir, err = os.MkdirTemp(h.Dir, "vnetsim")
			name = filepath.Base(h.Dir)
		} else {
			h.Dir = filepath.Join(h.Dir, name)
			err = os.Mkdir(h.Dir, 0o755)
		}
		if err != nil {
			return nil, fmt.Errorf("make a cgroup: %w", err)
		}
		made = append(made, h)
		if err := openCgroup(h); err != nil {
			return nil, err
		}
	}
	return made, nil
}

// cgroupMounts reads the hierarchies of this machine, with the caller's own
// directory in each.
func cgroupMounts() ([]cgroup, error) {
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	paths := map[string]string{} // by controllers, "" for cgroup2
	for line := range strings.Lines(string(own)) {
		if f := strings.SplitN(strings.TrimSpace(line), ":", 3); len(f) == 3 {
			paths[f[1]] = f[2]
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var found []cgroup
	for line := range strings.Lines(string(mounts)) {
		before, after, _ := strings.Cut(strings.TrimSpace(line), " - ")
		f, g := strings.Fields(before), strings.Fields(after)
		if len(f) < 5 || len(g) < 3 || !strings.HasPrefix(g[0], "cgroup") || !strings.HasPrefix(f[4], "/sys/fs/cgroup") {
			continue
		}
		c := cgroup{Mount: f[4], FSType: g[0]}
		for controllers := range paths {
			if c.FSType == "cgroup" && controllers != "" && containsAll(strings.Split(g[2], ","), strings.Split(controllers, ",")) {
				c.Opts = controllers
			}
		}
		path, ok := paths[c.Opts]
		if !ok || c.FSType == "cgroup" && c.Opts == "" {
			continue
		}
		rel, err := filepath.Rel(f[3], path) // the mount may show a part of the hierarchy
		if err != nil || strings.HasPrefix(rel, "..") {
			rel = "."
		}
		c.Dir = filepath.Join(c.Mount, rel)
		found = append(found, c)
	}
	return found, nil
}

func containsAll(all, some []string) bool {
	return !slices.ContainsFunc(some, func(s string) bool { return !slices.Contains(all, s) })
}

// openCgroup makes children of c usable.
func openCgroup(c cgroup) error {
	if c.FSType == "cgroup2" {
		// Refused where the parent has processes, and then there are no limits: no loss here.
		delegate(filepath.Dir(c.Dir))
		delegate(c.Dir)
		return nil
	}
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} { // empty in a new one, which then takes no process
		value, err := os.ReadFile(filepath.Join(filepath.Dir(c.Dir), file))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(c.Dir, file), value, 0)
		}
		if err != nil {
			return fmt.Errorf("make a cgroup: %w", err)
		}
	}
	return os.WriteFile(filepath.Join(c.Dir, "cgroup.clone_children"), []byte("1"), 0)
}

// delegate lets the children of a cgroup2 directory have all its controllers.
func delegate(dir string) {
	controllers, _ := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	for _, c := range strings.Fields(string(controllers)) {
		os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0)
	}
}

// childCgroups makes a directory with the name in each cgroup.
func childCgroups(parents []cgroup, name string) ([]cgroup, error) {
	var made []cgroup
	for _, c := range parents {
		c.Dir = filepath.Join(c.Dir, name)
		if err := os.Mkdir(c.Dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, fmt.Errorf("make a cgroup: %w", err)
		}
		made = append(made, c)
	}
	return made, nil
}

func cgroupDirs(cs []cgroup) []string {
	var dirs []string
	for _, c := range cs {
		dirs = append(dirs, c.Dir)
	}
	return dirs
}

// removeCgroup removes a tree of cgroups, whose files cannot be unlinked.
func removeCgroup(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeCgroup(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return syscall.Rmdir(dir)
}

// enterCgroups moves the calling process into the cgroups and makes them the
// roots of a new cgroup namespace of the calling thread.
func enterCgroups(cs []cgroup) error {
	for _, c := range cs {
		if err := os.WriteFile(filepath.Join(c.Dir, "cgroup.procs"), []byte("0"), 0); err != nil {
			return fmt.Errorf("enter a cgroup: %w", err)
		}
	}
	if err := syscall.Unshare(syscall.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("make a cgroup namespace: %w", err)
	}
	return nil
}

// mountCgroups mounts the hierarchies as the calling thread's cgroup namespace
// shows them.
func mountCgroups(cs []cgroup) error {
	pure := slices.ContainsFunc(cs, func(c cgroup) bool { return c.Mount == "/sys/fs/cgroup" })
	if !pure {
		if err := syscall.Mount("tmpfs", "/sys/fs/cgroup", "tmpfs", 0, "mode=755"); err != nil {
			return fmt.Errorf("mount /sys/fs/cgroup: %w", err)
		}
	}
	for _, c := range cs {
		if err := os.MkdirAll(c.Mount, 0o755); err != nil {
			return err
		}
		if err := syscall.Mount(c.FSType, c.Mount, c.FSType, 0, c.Opts); err != nil {
			return fmt.Errorf("mount %s: %w", c.Mount, err)
		}
		if c.FSType == "cgroup2" {
			// A cgroup2 directory has processes or children with controllers, not both.
			leaf := filepath.Join(c.Mount, cgroupLeaf)
			if err := os.Mkdir(leaf, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return err
			}
			if err := os.WriteFile(filepath.Join(leaf, "cgroup.procs"), []byte("0"), 0); err != nil {
				return fmt.Errorf("enter a cgroup: %w", err)
			}
			delegate(c.Mount)
		}
	}
	return nil
}

// cgroupLeaf is where the processes of a VM are in a cgroup2 hierarchy.
const cgroupLeaf = "init"

// procsFiles are the files that take a process into the VM's cgroups.
func procsFiles(cs []cgroup) []string {
	var files []string
	for _, c := range cs {
		if c.FSType == "cgroup2" {
			c.Dir = filepath.Join(c.Dir, cgroupLeaf)
		}
		files = append(files, filepath.Join(c.Dir, "cgroup.procs"))
	}
	return files
}
