// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/pkg/types"

	"azurevnet/internal/statefile"
)

// StateDir is the directory of the state that all processes of azure-vnet on a host share. It is gone after a reboot.
const StateDir = "/run/azure-vnet"

// callsDir has one lock file for each container's interface that a call works on.
const callsDir = StateDir + "/calls"

// callLock returns the path of an owner's lock file. The plugin's name is part of it, because azure-vnet may hold its
// lock while it waits for an IPAM plugin that runs azure-vnet-ipam for the same owner.
func callLock(plugin, owner string) (path string) {
	sum := sha256.Sum256([]byte(owner))
	return filepath.Join(callsDir, plugin+"-"+hex.EncodeToString(sum[:8]))
}

// lockOwner waits until no other call works on the call's interface, and then keeps other calls out. ADD needs this
// because it takes away what an earlier ADD left. Without the lock it would take away what a second ADD is making.
func (c *Call) lockOwner(ctx context.Context) (unlock func(), err error) {
	path := callLock(c.plugin.Name, c.Owner())
	unlock, err = statefile.Lock(ctx, path, c.Verb)
	if err != nil && !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, context.Canceled) {
		return nil, explainUnwritable(err) // no other call is in the way, but the disk or a missing right
	}
	if err != nil {
		return nil, Errorf(types.ErrTryAgainLater, "another call works on interface %s of container %s: %v", c.IfName, c.ContainerID, err)
	}
	return removeAndUnlock(path, unlock), nil
}

// removeAndUnlock returns a function that deletes the lock file and gives the lock back. Another call that waits for the
// lock then makes a new file.
func removeAndUnlock(path string, unlock func()) func() {
	return func() {
		_ = os.Remove(path)
		unlock()
	}
}

// TryLockOwner takes the lock of an owner's interface for GC. ok is false if another call of the plugin works on the
// interface.
func TryLockOwner(plugin, owner string) (unlock func(), ok bool, err error) {
	path := callLock(plugin, owner)
	unlock, ok, err = statefile.TryLock(path, "GC")
	return removeAndUnlock(path, unlock), ok, err
}

// RemoveLeftLocks deletes the lock files that calls left which were killed. A runtime may never call for these interfaces
// again. A lock file that a call holds stays.
func RemoveLeftLocks() {
	paths, _ := filepath.Glob(filepath.Join(callsDir, "*"))
	for _, path := range paths {
		if unlock, ok, err := statefile.TryLock(path, "reconcile"); err == nil && ok {
			removeAndUnlock(path, unlock)()
		}
	}
}

// tryState writes a file into the directory that ADD and DEL write to, and removes it.
func (c *Call) tryState() error {
	path := filepath.Join(callsDir, c.plugin.Name+"-status")
	err := os.MkdirAll(callsDir, 0o755)
	if err == nil {
		err = os.WriteFile(path, []byte("STATUS"), 0o600)
		_ = os.Remove(path)
	}
	if err != nil {
		return Errorf(types.ErrPluginNotAvailable, "%v", explainUnwritable(err))
	}
	return nil
}

// explainUnwritable adds to the error of a write in StateDir what to do about it.
func explainUnwritable(err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("the state in %s cannot be written: %w: that is for root of the host, which no plain user is, nor root of a user namespace, as in a rootless container engine: run the container runtime as root of the host", StateDir, err)
	}
	return fmt.Errorf("the state in %s cannot be written: %w: give it a file system that can be written to and has room", StateDir, err)
}
