// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"encoding/json"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/utils"
)

// attachPrefix begins the owner of a container that the word attach attached. No runtime's owner begins so.
const attachPrefix = "attach/"

// AttachArg is the key and value in CNI_ARGS by which the words attach and detach say that no runtime calls. A container
// of theirs is in no runtime's list, so no runtime's GC may collect it.
var AttachArg = [2]string{"AZURE_VNET_ATTACH", "1"}

// Owner is who holds the call's address and link: cni/<network>/<containerID>/<ifname>, or the same parts after attach/.
// The parts have no slash, so two calls for different interfaces never have the same owner.
func (c *Call) Owner() string {
	if c.attach {
		return attachPrefix + c.Conf.Network + "/" + c.ContainerID + "/" + c.IfName
	}
	return c.runtimeOwner()
}

// Owners lists every owner that the call's interface may have. The word attach of earlier builds used a runtime's owner,
// so detach has to look for both.
func (c *Call) Owners() []string {
	if c.attach {
		return []string{c.Owner(), c.runtimeOwner()}
	}
	return []string{c.Owner()}
}

func (c *Call) runtimeOwner() string { return c.runtimePrefix() + c.ContainerID + "/" + c.IfName }

// runtimePrefix begins the owners of the containers that runtimes have on the call's network. No other owner begins so.
func (c *Call) runtimePrefix() string { return "cni/" + c.Conf.Network + "/" }

// CheckOwner is an error if the owner is longer than 255 bytes: the kernel has no room for more in a link's alias.
func (c *Call) CheckOwner() error {
	if n := len(c.Owner()); n > 255 {
		return Errorf(types.ErrInvalidEnvironmentVariables, "the names of the network, the container and the interface have %d bytes together, and 255 at most can be kept", n)
	}
	return nil
}

// Stale returns a function for GC. It reports whether an owner is a runtime's, on the call's network, and not in the
// list of valid attachments. A configuration without such a list is an error: it does not say what is to be kept.
func (c *Call) Stale() (func(owner string) bool, error) {
	if !c.Conf.listsValid {
		return nil, Errorf(types.ErrInvalidNetworkConfig, "GC of network %s: cni.dev/valid-attachments is missing: what is to be kept is not known, and nothing was released", c.Conf.Network)
	}
	keep := map[string]bool{}
	for _, a := range c.Conf.valid {
		if utils.ValidateContainerID(a.ContainerID) == nil {
			keep[c.runtimePrefix()+a.ContainerID+"/"+a.IfName] = true
		}
	}
	return func(owner string) bool { return strings.HasPrefix(owner, c.runtimePrefix()) && !keep[owner] }, nil
}

// AttachedByWord reports whether the word attach attached the owner to the call's network.
func (c *Call) AttachedByWord(owner string) bool {
	return strings.HasPrefix(owner, attachPrefix+c.Conf.Network+"/")
}

// AddValid adds owners to the valid attachments in the configuration that a delegated IPAM plugin is given. Without
// that, its GC would collect the containers of the word attach.
func (c *Call) AddValid(owners []string) error {
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
	for _, key := range []string{"cni.dev/valid-attachments", "cni.dev/attachments"} { // older runtimes write the second key
		conf[key] = text
	}
	c.Stdin, err = json.Marshal(conf)
	return err
}
