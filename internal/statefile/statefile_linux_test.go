// Copyright (c) The azure-vnet authors. MIT licence.

package statefile

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Run in a mount namespace of its own, on file systems made for it.
func TestAFullOrReadOnlyDiskIsAnErrorAndLosesNothing(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to mount")
	}
	if os.Getenv("STATEFILE_TEST_MOUNTS") == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), "STATEFILE_TEST_MOUNTS=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=16k"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	path := filepath.Join(dir, "shelf.json")
	set := func(pad int) error {
		return Update(t.Context(), path, "test", func(s *shelf) error {
			s.Books = map[string]book{"pad": {Title: strings.Repeat("x", pad)}}
			return nil
		})
	}
	if err := set(10); err != nil {
		t.Fatal(err)
	}
	before := fileText(t, path)
	if err := set(20000); !errors.Is(err, syscall.ENOSPC) || fileText(t, path) != before {
		t.Errorf("full disk: %v; the file is %q", err, fileText(t, path))
	}
	if err := set(20); err != nil {
		t.Errorf("the failure left the disk full: %v", err)
	}
	before = fileText(t, path)
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	if err := set(30); !errors.Is(err, syscall.EROFS) || fileText(t, path) != before {
		t.Errorf("read-only disk: %v; the file is %q", err, fileText(t, path))
	}
}
