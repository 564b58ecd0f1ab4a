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

// networksVersion is the version of networks.json. A change raises it only if an older release would misread the file.
const networksVersion = 1

// Networks is the content of networks.json: the networks that engines created.
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
	Direct     []netip.Prefix `json:"direct,omitempty"`     // nil: the default of bridge.Policy
	NoMetadata bool           `json:"noMetadata,omitempty"` // containers do not reach 169.254.169.254
	Aux        []Aux          `json:"aux,omitempty"`        // auxiliary addresses, ascending
}

// Transparent reports whether the network's containers are in no bridge.
func (n Network) Transparent() bool { return n.Mode == bridge.ModeTransparent }

// Aux is an auxiliary address of a network: no container gets it.
type Aux struct {
	Addr  netip.Addr `json:"addr"`
	Owner string     `json:"owner,omitempty"` // of its lease; empty: it has no lease, because this VM cannot lend it
	Name  string     `json:"name,omitempty"`  // from --aux-address; empty: an earlier release wrote the file
}

// unnamed returns the address without its name, which a lease does not have.
func (a Aux) unnamed() Aux { a.Name = ""; return a }

// same reports whether both have the same address and owner. The names are not compared, because one may be missing.
func (a Aux) same(o Aux) bool { return a.unnamed() == o.unnamed() }

// bridgeSpec returns what the network asks of the host.
func (n Network) bridgeSpec() bridge.Spec {
	return bridge.Spec{MAC: n.MAC, Name: n.Bridge, Primary: n.Primary, Mode: n.Mode, Subnet: n.Prefix, NICs: n.NICs}
}

// bridgePolicy returns what the network's containers may reach, and how.
func (n Network) bridgePolicy() bridge.Policy {
	return bridge.Policy{Internal: n.Internal, SNAT: n.SNAT, Direct: n.Direct, NoMetadata: n.NoMetadata}
}

// equal reports whether CreateNetwork asked for the same twice. Names of auxiliary addresses and the list of NICs are not
// compared: an earlier release may not have written them.
func (n Network) equal(o Network) bool {
	return n.MAC == o.MAC && n.Transparent() == o.Transparent() && n.Bridge == o.Bridge && n.MTU == o.MTU && n.Prefix == o.Prefix &&
		n.Gateway == o.Gateway && n.Internal == o.Internal && n.SNAT == o.SNAT && n.NoMetadata == o.NoMetadata &&
		slices.Equal(n.Direct, o.Direct) && slices.EqualFunc(n.Aux, o.Aux, Aux.same)
}

// NetworksFile is the path of networks.json in dir.
func NetworksFile(dir string) string { return filepath.Join(dir, "networks.json") }

// Check refuses a file of another version: if this release guessed, it could lose networks, which engines tell only once.
// It also refuses a network that no release writes.
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

// checkIPv4 refuses a network with an address that is not IPv4, or with a gateway outside of its subnet.
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

// ReadNetworks reads networks.json in dir. If there is no file, there are no networks. If the file cannot be read, that is
// an error, and the file stays as it is.
func ReadNetworks(dir string) (Networks, error) {
	file, err := statefile.Read[Networks](NetworksFile(dir))
	if err != nil {
		return Networks{}, fmt.Errorf("docker's networks: %w", err)
	}
	return file, nil
}

// readNetworks reads the driver's networks.json. Its error says what to do.
func (d *Driver) readNetworks() (Networks, error) {
	file, err := ReadNetworks(d.cfg.Dir)
	return file, d.explainUnreadable(err)
}

// explainUnreadable adds to the error of a damaged networks.json where the file is and what to do. It is not set aside and
// begun anew, as other state is: an engine tells no network twice, and only the operator knows whether there is a copy.
func (d *Driver) explainUnreadable(err error) error {
	if !errors.Is(err, statefile.ErrUnreadable) {
		return err
	}
	return fmt.Errorf("%w; the file is left as it is, on the host it is %s: put a copy in its place, or take it away and remove and create the networks again", err, NetworksFile(d.cfg.OnHost))
}

// findNetwork returns the network with the id. It is an error if networks.json lacks the network.
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

// changeNetworks has change alter the networks, by id, under the file's lock. When it returns, the file is on the disk. who
// names the call for others that wait for the lock.
func (d *Driver) changeNetworks(ctx context.Context, who string, change func(map[string]Network) error) error {
	return d.explainUnreadable(statefile.UpdateDurably(ctx, NetworksFile(d.cfg.Dir), who, func(f *Networks) error {
		f.Version = networksVersion
		if f.Networks == nil {
			f.Networks = map[string]Network{}
		}
		return change(f.Networks)
	}))
}
