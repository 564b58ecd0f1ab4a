// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/utils"
	"github.com/containernetworking/cni/pkg/version"

	"azurevnet/internal/statefile"
)

// Owner is whose the call's address and link are. Its parts have no slash, so
// that no two calls' owners are one.
func (c *Call) Owner() string {
	if c.attach {
		return attachPrefix + c.Conf.Network + "/" + c.ContainerID + "/" + c.IfName
	}
	return c.runtimeOwner()
}

// Owners are all that the container's interface may be held by. Builds before the
// owner "attach/…" had the word attach use a runtime's owner.
func (c *Call) Owners() []string {
	if c.attach {
		return []string{c.Owner(), c.runtimeOwner()}
	}
	return []string{c.Owner()}
}

func (c *Call) runtimeOwner() string { return c.prefix() + c.ContainerID + "/" + c.IfName }

// prefix begins the owners of the runtime's containers on the call's network, and no others.
func (c *Call) prefix() string { return "cni/" + c.Conf.Network + "/" }

const attachPrefix = "attach/" // of an owner that no runtime has

// AttachArg in CNI_ARGS says that no runtime calls, but a person or docker-run.sh by the word
// attach. Such a container is in no runtime's list, and no runtime may collect it.
var AttachArg = [2]string{"AZURE_VNET_ATTACH", "1"}

// callsDir has a lock file for each container's interface that a call is at work on.
const callsDir = stateDir + "/calls"

// callLock is the lock file of an owner. The plugin's name is in it: azure-vnet may wait for
// an IPAM plugin that runs azure-vnet-ipam in its turn.
func callLock(plugin, owner string) (path string) {
	sum := sha256.Sum256([]byte(owner))
	return filepath.Join(callsDir, plugin+"-"+hex.EncodeToString(sum[:8]))
}

// lockOwner waits until no other call works on the call's interface. The look at what an
// earlier call left, and all that is done about it, are one step for the others then: an ADD
// would else take what another ADD is about to make for a leftover of a dead one.
func (c *Call) lockOwner(ctx context.Context, plugin string) (unlock func(), err error) {
	path := callLock(plugin, c.Owner())
	unlock, err = statefile.Lock(ctx, path, c.Verb)
	if err != nil && !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, context.Canceled) {
		return nil, unwritable(err) // the disk or a missing right is in the way, and no other call
	}
	if err != nil {
		return nil, wrong(types.ErrTryAgainLater, "another call works on interface %s of container %s: %v", c.IfName, c.ContainerID, err)
	}
	return removing(path, unlock), nil
}

// removing is an unlock that deletes the lock's file. Another call that waits for the lock
// then makes a new file.
func removing(path string, unlock func()) func() {
	return func() {
		_ = os.Remove(path)
		unlock()
	}
}

// TryLockOwner is false if a call works on the owner's interface.
func TryLockOwner(plugin, owner string) (unlock func(), ok bool, err error) {
	path := callLock(plugin, owner)
	unlock, ok, err = statefile.TryLock(path, "GC")
	return removing(path, unlock), ok, err
}

// CheckOwner refuses what the kernel has no room for.
func (c *Call) CheckOwner() error {
	if n := len(c.Owner()); n > 255 {
		return wrong(types.ErrInvalidEnvironmentVariables, "the names of the network, the container and the interface have %d bytes together, and 255 at most can be kept", n)
	}
	return nil
}

// Stale tells, for GC, whether owner is of this network and is not listed.
func (c *Call) Stale() (func(owner string) bool, error) {
	if !c.Conf.validSaid {
		return nil, wrong(types.ErrInvalidNetworkConfig, "GC of network %s: cni.dev/valid-attachments is missing: what is to be kept is not known, and nothing was released", c.Conf.Network)
	}
	keep := map[string]bool{}
	for _, a := range c.Conf.valid {
		if utils.ValidateContainerID(a.ContainerID) == nil {
			keep[c.prefix()+a.ContainerID+"/"+a.IfName] = true
		}
	}
	return func(owner string) bool { return strings.HasPrefix(owner, c.prefix()) && !keep[owner] }, nil
}

// Attached reports whether owner is of this network and of the word attach.
func (c *Call) Attached(owner string) bool {
	return strings.HasPrefix(owner, attachPrefix+c.Conf.Network+"/")
}

// Keep adds owners to those that the configuration lists as valid, for a plugin that it is handed on to.
func (c *Call) Keep(owners []string) error {
	if len(owners) == 0 {
		return nil
	}
	var conf map[string]json.RawMessage
	if err := json.Unmarshal(c.Stdin, &conf); err != nil {
		return err
	}
	valid := c.Conf.valid
	for _, owner := range owners {
		if parts := strings.Split(owner, "/"); len(parts) == 4 {
			valid = append(valid, types.GCAttachment{ContainerID: parts[2], IfName: parts[3]})
		}
	}
	text, err := json.Marshal(valid)
	if err != nil {
		return err
	}
	for _, key := range []string{"cni.dev/valid-attachments", "cni.dev/attachments"} { // the second is that of older runtimes
		conf[key] = text
	}
	c.Stdin, err = json.Marshal(conf)
	return err
}

// wrong is an error with its code.
func wrong(code uint, format string, args ...any) *types.Error {
	return types.NewError(code, fmt.Sprintf(format, args...), "")
}

// PrevResult is the result that the runtime hands back, which CHECK needs.
func (c *Call) PrevResult() (*current.Result, error) {
	if len(c.Conf.prev) == 0 || string(c.Conf.prev) == "null" {
		return nil, wrong(types.ErrInvalidNetworkConfig, "%s of container %s: prevResult is missing", c.Verb, c.ContainerID)
	}
	r, err := version.NewResult(c.Conf.CNIVersion, c.Conf.prev)
	if err == nil {
		var prev *current.Result
		if prev, err = current.NewResultFromResult(r); err == nil {
			return prev, nil
		}
	}
	return nil, wrong(types.ErrDecodingFailure, "prevResult: %v", err)
}
