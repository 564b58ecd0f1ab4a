// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"azurevnet/internal/statefile"
)

// hostState is host.json: what of the host's network the kernel cannot tell.
type hostState struct {
	Version  int                     `json:"version"`
	Boot     string                  `json:"boot"` // the kernel's boot id; a state of another boot is void
	Bridges  map[string]*bridgeState `json:"bridges,omitempty"`
	Policies map[string]Policy       `json:"policies,omitempty"`
	Ports    map[string][]Port       `json:"ports,omitempty"` // published, by host veth; those of a link whose alias has none are void
	NICs     []string                `json:"nics,omitempty"`  // see Spec
}

// A bridge's phase is the journal of its NIC's move.
const (
	moving   = "moving"   // begun: finish it, or undo it
	standing = "standing" // done and verified
	leaving  = "leaving"  // the way back is begun: finish it
)

// bridgeState is what was wished of a bridge and the identity it carries.
type bridgeState struct {
	Phase  string   `json:"phase"`
	NIC    string   `json:"nic"`           // name
	MAC    string   `json:"mac"`           // lower case with colons
	MTU    int      `json:"mtu,omitempty"` // bytes as asked for; 0: the NIC's
	Moved  identity `json:"moved"`         // came from the NIC and must stand
	Joined identity `json:"joined"`        // others gave it to the bridge since: theirs to take away, ours to bring back with a lost bridge

	unsaved bool // host.json does not say it yet: it was read from the kernel, or another MTU is wished
}

const stateVersion = 1

// Check makes a file of another version unreadable.
func (s hostState) Check() error {
	if s.Version != stateVersion {
		return fmt.Errorf("version %d, and this program knows %d", s.Version, stateVersion)
	}
	return nil
}

// renew empties a state that is new or of another boot.
func (s *hostState) renew() error {
	boot, err := bootID()
	if err != nil {
		return err
	}
	if s.Boot != boot {
		*s = hostState{Version: stateVersion, Boot: boot}
	}
	if s.Bridges == nil {
		s.Bridges = map[string]*bridgeState{}
	}
	if s.Policies == nil {
		s.Policies = map[string]Policy{}
	}
	if s.Ports == nil {
		s.Ports = map[string][]Port{}
	}
	return nil
}

// state reads host.json. None, one of another boot and one that cannot be
// understood are an empty state: the kernel tells the rest.
func (h *Host) state() (*hostState, error) {
	s, err := statefile.Read[hostState](h.path("host.json"))
	if errors.Is(err, statefile.ErrUnreadable) {
		s, err = hostState{}, nil
	}
	if err != nil {
		return nil, err
	}
	return &s, s.renew()
}

// updateState changes host.json under its own lock; who is named to those who
// wait. A file that cannot be understood is set aside first. Nothing is written
// when change returns an error, which comes back as it is. The file and its
// directory are on disk when updateState returns.
func (h *Host) updateState(ctx context.Context, who string, change func(*hostState) error) error {
	file := h.path("host.json")
	renewed := func(s *hostState) error {
		if err := s.renew(); err != nil {
			return err
		}
		return change(s)
	}
	err := statefile.Durable(ctx, file, who, renewed)
	if errors.Is(err, statefile.ErrUnreadable) {
		if err = statefile.SetAside[hostState](ctx, file, who); err == nil {
			err = statefile.Durable(ctx, file, who, renewed)
		}
	}
	return err
}

// bootID tells this boot of the kernel from any other.
func bootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(id)), err
}
