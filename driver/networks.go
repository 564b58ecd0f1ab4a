// Copyright (c) The azure-vnet authors. MIT licence.

package driver

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"

	"azurevnet/bridge"
	"azurevnet/internal/statefile"
)

// networksVersion is the version of networks.json. Only a change that an older
// release would misread raises it.
const networksVersion = 1

// Networks is networks.json: what Docker told once and, after a reboot, never
// tells again.
type Networks struct {
	Version  int                `json:"version"`
	Networks map[string]Network `json:"networks"` // by Docker's id
}

// Network is one Docker network.
type Network struct {
	MAC        string         `json:"mac"`               // of the NIC, lower case with colons
	Primary    bool           `json:"primary,omitempty"` // the NIC is the VM's primary
	Mode       bridge.Mode    `json:"mode,omitempty"`    // empty, as earlier releases wrote it: bridge.ModeBridge
	Bridge     string         `json:"bridge,omitempty"`  // name asked for; empty: the NIC's own, or none if the network is transparent
	MTU        int            `json:"mtu,omitempty"`     // bytes, of each container's interface; 0: the NIC's
	NICs       []string       `json:"nics,omitempty"`    // MACs of all NICs that the VM had
	Prefix     netip.Prefix   `json:"prefix"`            // the NIC's subnet
	Gateway    netip.Addr     `json:"gateway"`
	Internal   bool           `json:"internal,omitempty"` // --internal; SNAT, Direct and NoMetadata then say nothing
	SNAT       bool           `json:"snat"`
	Direct     []netip.Prefix `json:"direct,omitempty"`     // none: bridge.Policy's own
	NoMetadata bool           `json:"noMetadata,omitempty"` // containers do not reach 169.254.169.254
	Aux        []Aux          `json:"aux,omitempty"`        // auxiliary addresses, ascending
}

// Transparent reports whether the network's containers are in no bridge.
func (n Network) Transparent() bool { return n.Mode == bridge.ModeTransparent }

// Aux is an auxiliary address: held for the network, and by no container.
type Aux struct {
	Addr  netip.Addr `json:"addr"`
	Owner string     `json:"owner,omitempty"` // of its lease; empty: it is not this VM's to lend, and only written down
	Name  string     `json:"name,omitempty"`  // as --aux-address gave it; empty: an earlier release wrote it down
}

// unnamed is the address as a lease identifies it: without its name.
func (a Aux) unnamed() Aux { a.Name = ""; return a }

// same reports whether both are one address with one owner. A name may be missing.
func (a Aux) same(o Aux) bool { return a.unnamed() == o.unnamed() }

func (n Network) bridgeSpec() bridge.Spec {
	return bridge.Spec{MAC: n.MAC, Name: n.Bridge, Primary: n.Primary, Mode: n.Mode, Subnet: n.Prefix, NICs: n.NICs}
}

func (n Network) bridgePolicy() bridge.Policy {
	return bridge.Policy{Internal: n.Internal, SNAT: n.SNAT, Direct: n.Direct, NoMetadata: n.NoMetadata}
}

func (n Network) equal(o Network) bool {
	return n.MAC == o.MAC && n.Transparent() == o.Transparent() && n.Bridge == o.Bridge && n.MTU == o.MTU && n.Prefix == o.Prefix &&
		n.Gateway == o.Gateway && n.Internal == o.Internal && n.SNAT == o.SNAT && n.NoMetadata == o.NoMetadata &&
		slices.Equal(n.Direct, o.Direct) && slices.EqualFunc(n.Aux, o.Aux, Aux.same)
}

// NetworksFile is the path of networks.json in dir.
func NetworksFile(dir string) string { return filepath.Join(dir, "networks.json") }

// Check refuses a version that this release does not know: guessing would lose
// networks that Docker tells only once. It refuses a network that no release wrote too.
func (f Networks) Check() error {
	if f.Version != networksVersion {
		return fmt.Errorf("it is of version %d and this release knows only %d, so run the release that wrote it", f.Version, networksVersion)
	}
	for id, n := range f.Networks {
		if err := n.checkIPv4(); err != nil {
			return fmt.Errorf("network %.64q: %w", id, err)
		}
	}
	return nil
}

// checkIPv4 refuses what would not do for IPv4.
func (n Network) checkIPv4() error {
	if n.Prefix.IsValid() && !n.Prefix.Addr().Is4() || n.Prefix != n.Prefix.Masked() || n.Gateway.IsValid() && !n.Prefix.Contains(n.Gateway) {
		return fmt.Errorf("%s with the gateway %s is no subnet of IPv4", n.Prefix, n.Gateway)
	}
	for _, p := range n.Direct {
		if !p.Addr().Is4() || p.Bits() < 0 {
			return fmt.Errorf("direct has %s, which is no prefix of IPv4", p)
		}
	}
	for _, a := range n.Aux {
		if !a.Addr.Is4() {
			return fmt.Errorf("the auxiliary address %s is not of IPv4", a.Addr)
		}
	}
	return nil
}

// ReadNetworks reads networks.json in dir; a file that is not there has no
// networks. One that cannot be read is an error and is left as it is.
func ReadNetworks(dir string) (Networks, error) {
	file, err := statefile.Read[Networks](NetworksFile(dir))
	if err != nil {
		return Networks{}, fmt.Errorf("docker's networks: %w", err)
	}
	return file, nil
}

// readNetworks returns the networks that were created here.
func (d *Driver) readNetworks() (Networks, error) {
	file, err := ReadNetworks(d.cfg.Dir)
	return file, d.explainUnreadable(err)
}

// explainUnreadable says of a file that cannot be read where it is and what to do: nobody but
// the operator knows whether there is a copy, and Docker tells no network twice.
func (d *Driver) explainUnreadable(err error) error {
	if !errors.Is(err, statefile.ErrUnreadable) {
		return err
	}
	return fmt.Errorf("%w; the file is left as it is, on the host it is %s: put a copy in its place, or take it away and remove and create the networks again", err, NetworksFile(d.cfg.OnHost))
}

// findNetwork returns a findNetwork that was created here.
func (d *Driver) findNetwork(id string) (Network, error) {
	file, err := d.readNetworks()
	if err != nil {
		return Network{}, err
	}
	n, ok := file.Networks[id]
	if !ok {
		return Network{}, fmt.Errorf("network %.64q is not known here: remove it and create it again", id)
	}
	return n, nil
}

// changeNetworks lets fn change the file, and has it on disk when it returns.
func (d *Driver) changeNetworks(ctx context.Context, who string, fn func(map[string]Network) error) error {
	return d.explainUnreadable(statefile.UpdateDurably(ctx, NetworksFile(d.cfg.Dir), who, func(f *Networks) error {
		f.Version = networksVersion
		if f.Networks == nil {
			f.Networks = map[string]Network{}
		}
		return fn(f.Networks)
	}))
}
