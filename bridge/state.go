// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/gofrs/flock"
)

// hostState is host.json: what of the host's network the kernel cannot tell.
type hostState struct {
	Version  int                     `json:"version"`
	Boot     string                  `json:"boot"` // the kernel's boot id; a state of another boot is void
	Bridges  map[string]*bridgeState `json:"bridges,omitempty"`
	Policies map[string]Policy       `json:"policies,omitempty"`
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
}

const stateVersion = 1

// state reads host.json. None, one of another boot and one that cannot be
// understood are an empty state: the kernel tells the rest.
func (h *Host) state() (*hostState, error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	fresh := &hostState{Version: stateVersion, Boot: boot}
	data, err := os.ReadFile(h.path("host.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return fresh, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the host's state: %w", err)
	}
	s := &hostState{}
	if json.Unmarshal(data, s) != nil || s.Version != stateVersion || s.Boot != boot {
		return fresh, nil
	}
	return s, nil
}

// updateState changes host.json under its own lock; who is named to those who
// wait. Nothing is written when change returns an error, which comes back as it
// is. The file and its directory are on disk when updateState returns.
func (h *Host) updateState(ctx context.Context, who string, change func(*hostState) error) error {
	if err := os.MkdirAll(h.path(), 0o700); err != nil {
		return err
	}
	l := flock.New(h.path("host.json.lock"))
	if _, err := l.TryLockContext(ctx, lockPoll); err != nil {
		return fmt.Errorf("lock %s for %q: %w", l.Path(), who, err)
	}
	defer l.Close()
	s, err := h.state()
	if err != nil {
		return err
	}
	if s.Bridges == nil {
		s.Bridges = map[string]*bridgeState{}
	}
	if s.Policies == nil {
		s.Policies = map[string]Policy{}
	}
	if err := change(s); err != nil {
		return err
	}
	data, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return replaceFile(h.path("host.json"), data)
}

// replaceFile puts data in the place of file, whole or not at all.
func replaceFile(file string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(file), filepath.Base(file)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(data)
	err = errors.Join(err, f.Chmod(0o600), f.Sync(), f.Close())
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), file)
}

// bootID tells this boot of the kernel from any other.
func bootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(id)), err
}
