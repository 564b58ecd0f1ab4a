// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// Check returns what of owner's attachment is not as Attach left it in the host's namespace, as one error with
// a line for each fault. It returns nil if everything is right, and changes nothing. It holds the host's lock
// while it reads, because what another call has half made is not a fault.
func (h *Host) Check(ctx context.Context, owner string) error {
	unlock, err := h.lockHost(ctx, "check "+owner)
	if err != nil {
		return err
	}
	defer unlock()
	if err := h.checkLocked(owner); err != nil {
		return fmt.Errorf("check %s: %w", owner, err)
	}
	return nil
}

func (h *Host) checkLocked(owner string) error {
	v, err := h.readView()
	if err != nil {
		return err
	}
	name, _ := linkNames(owner)
	i := slices.IndexFunc(v.endpoints, func(e endpoint) bool { return e.link.Name == name && e.isOf(owner) })
	if i < 0 {
		return fmt.Errorf("its link %s is gone: end the container and start it again", name)
	}
	e := v.endpoints[i]
	var errs []error
	for _, f := range slices.Concat(h.nicFaults(v, e.nic), h.sysctlFault(ipForward), h.bridgeFaults(v, e.nic), h.endpointFaults(v, e), e.containerFaults(), routingFaults(v)) {
		errs = append(errs, errors.New(f.what))
	}
	if e.bridge != "" && v.linkToContainer(e) == 0 && len(errs) == 0 {
		errs = append(errs, fmt.Errorf("%s is half made: azure-vnet mends it within 30 s", e.bridge))
	}
	ports := v.publishedPorts()[name]
	if e.ports > 0 && len(ports) == 0 {
		errs = append(errs, errors.New("its published ports are not written down any more: end the container and start it again"))
	}
	missing, err := v.rulesetConfig().Missing(v.rulesetEndpoint(e.alias, name, ports))
	for _, what := range missing {
		errs = append(errs, errors.New(what))
	}
	return errors.Join(append(errs, err)...)
}
