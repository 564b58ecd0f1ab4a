// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"regexp"

	"azurevnet/internal/statefile"
)

// hostState is the content of host.json: what the kernel cannot tell of the host's network.
type hostState struct {
	Version  int                        `json:"version"`
	Boot     string                     `json:"boot"`               // the kernel's boot id. The state of another boot counts as empty
	NICs     map[string]nicState        `json:"nics,omitempty"`     // by MAC: the VM's NICs, as far as they are known
	Policies map[string]Policy          `json:"policies,omitempty"` // by id
	Ports    map[string][]PublishedPort `json:"ports,omitempty"`    // claimed ports, by host end. Those of a link whose alias has no ports are void
	Zones    map[string]string          `json:"zones,omitempty"`    // zones of firewalld, by link of ours: those that we put the link into, or are about to
}

// nicState is what was asked of a NIC since the boot.
type nicState struct {
	Name        string       `json:"name,omitempty"`        // the name that the NIC had last. It is a hint, because a NIC may be renamed
	Bridge      string       `json:"bridge,omitempty"`      // name of the NIC's bridge; empty: no bridge is asked for
	Primary     bool         `json:"primary,omitempty"`     // the NIC is the VM's primary
	Transparent bool         `json:"transparent,omitempty"` // transparent endpoints are asked for
	Subnet      netip.Prefix `json:"subnet,omitzero"`       // of the virtual network that the NIC is in
	Prepared    bool         `json:"prepared,omitempty"`    // a round has made all that was asked for. It is false after a crash of Ensure
}

const stateVersion = 2

// Check refuses a file of another version, and a file with a value that no program writes. Examples are an impossible
// name of a bridge and an IPv6 prefix. With such a value, no round could mend anything.
func (s hostState) Check() error {
	if s.Version != stateVersion {
		return fmt.Errorf("its version is %d, and this program knows %d only", s.Version, stateVersion)
	}
	for mac, n := range s.NICs {
		hw, err := parseMAC(mac)
		if err == nil && hw.String() != mac {
			err = fmt.Errorf("%q is not spelled as the kernel does", mac)
		}
		if err == nil && n.Bridge != "" {
			err = checkExistingBridgeName(n.Bridge)
		}
		if err == nil && n.Subnet.IsValid() && !n.Subnet.Addr().Is4() {
			err = fmt.Errorf("%s is not a subnet of IPv4", n.Subnet)
		}
		if err != nil {
			return fmt.Errorf("a NIC: %w", err)
		}
	}
	for id, p := range s.Policies {
		if !policyID.MatchString(id) {
			return fmt.Errorf("%q is not the id of a policy", id)
		}
		for _, d := range p.Direct {
			if !d.IsValid() || !d.Addr().Is4() {
				return fmt.Errorf("the policy %s has %v, which is not a prefix of IPv4", id, d)
			}
		}
	}
	for link, ports := range s.Ports {
		for _, p := range ports {
			if _, err := p.normalized(); err != nil || p.HostPort == 0 {
				return fmt.Errorf("%s has the published port %s", link, p)
			}
		}
	}
	return nil
}

// policyID matches what Policy.id returns.
var policyID = regexp.MustCompile(`^[0-9a-f]{8}$`)

// startNewBoot empties a state that is new or of another boot.
func (s *hostState) startNewBoot() error {
	boot, err := statefile.BootID()
	if err != nil {
		return err
	}
	if s.Boot != boot {
		*s = hostState{Version: stateVersion, Boot: boot}
	}
	if s.NICs == nil {
		s.NICs = map[string]nicState{}
	}
	if s.Policies == nil {
		s.Policies = map[string]Policy{}
	}
	if s.Ports == nil {
		s.Ports = map[string][]PublishedPort{}
	}
	if s.Zones == nil {
		s.Zones = map[string]string{}
	}
	return nil
}

// isAsked reports whether anything was asked of the host since its boot.
func (s *hostState) isAsked() bool {
	for _, n := range s.NICs {
		if n.Bridge != "" || n.Transparent {
			return true
		}
	}
	return false
}

// readState reads host.json. If there is no file, or it is of another boot, or it cannot be understood, the
// state is empty, and the links tell the rest.
func (h *Host) readState() (*hostState, error) {
	s, err := statefile.Read[hostState](h.path("host.json"))
	if errors.Is(err, statefile.ErrUnreadable) {
		s, err = hostState{}, nil
	}
	if err != nil {
		return nil, err
	}
	return &s, s.startNewBoot()
}

// updateState changes host.json under the file's own lock. Another call that waits for the lock in vain is told
// who. A file that cannot be understood is set aside first. If change returns an error, nothing is written, and
// updateState returns that error.
func (h *Host) updateState(ctx context.Context, who string, change func(*hostState) error) error {
	file := h.path("host.json")
	renewed := func(s *hostState) error {
		if err := s.startNewBoot(); err != nil {
			return err
		}
		return change(s)
	}
	err := statefile.Update(ctx, file, who, renewed)
	if errors.Is(err, statefile.ErrUnreadable) {
		if err = statefile.SetAside[hostState](ctx, file, who); err == nil {
			err = statefile.Update(ctx, file, who, renewed)
		}
	}
	return err
}

// stateFaults are the NICs for which the links tell more than host.json, because the file was lost or could not
// be read.
func (h *Host) stateFaults(v *view) (all []fault) {
	for _, mac := range v.unrecorded {
		n := v.state.NICs[mac]
		all = append(all, fault{what: "host.json does not say what was asked of the NIC " + mac, mend: func() error {
			return h.updateState(context.Background(), "adopt what stands", func(s *hostState) error {
				is := s.NICs[mac]
				is.Name, is.Bridge, is.Transparent = v.nicName(mac), n.Bridge, n.Transparent
				s.NICs[mac] = is
				return nil
			})
		}})
	}
	return all
}
