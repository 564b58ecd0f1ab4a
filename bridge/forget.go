// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"fmt"
	"net/netip"
)

// Forget deletes the flows of an address whose link died with its container's
// namespace, before Detach could: the next container that has the address would
// be black-holed by them. None is success.
func (h *Host) Forget(addr netip.Addr) error {
	var nf netfilter
	defer nf.close()
	for _, f := range []flows{flowsFrom(addr), repliesOf(addr)} {
		if err := nf.forgetFlows(f); err != nil {
			return fmt.Errorf("forget the flows of %s: %w", addr, err)
		}
	}
	return nil
}
