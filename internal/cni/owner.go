// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"fmt"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/utils"
	"github.com/containernetworking/cni/pkg/version"
)

// Owner is whose the call's address and link are. Its parts have no slash, so
// that no two calls' owners are one.
func (c *Call) Owner() string { return c.prefix() + c.ContainerID + "/" + c.IfName }

// prefix begins the owners of the call's network, and of no other.
func (c *Call) prefix() string { return "cni/" + c.Conf.Network + "/" }

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
