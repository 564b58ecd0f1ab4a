// Copyright (c) The azure-vnet authors. MIT licence.

// Package pool has the addresses that Azure gave this VM, and says who holds each. It asks the sources for the
// addresses: the host agent, IMDS or a file. It keeps the leases in <run>/azure-vnet/leases.json. It makes no link, and
// knows neither the bridge, nor Docker, nor CNI.
//
// No process owns the pool. Each call locks the file, reads it, changes it, replaces it by a rename, and unlocks it.
// Sources are asked, and the host's addresses are read, outside of the lock. A SIGKILL between any two lines leaves at
// worst a leaked lease, which Collect ends. It never leaves an address with two holders.
package pool

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"time"
)

// Errors that callers branch on. The error around each of them says what failed, why, and what to do.
var (
	ErrExhausted = errors.New("no free address")        // Lease: no address is left, not even a cooling one
	ErrInUse     = errors.New("address in use")         // Lease: the address that is asked for is held
	ErrNotOurs   = errors.New("not ours to lend")       // the NIC, the subnet or the address is not this VM's, or cannot be lent
	ErrGone      = errors.New("lease gone")             // Confirm, MakeLinkless: the lease has ended
	ErrSource    = errors.New("no source has answered") // none since leases.json is new
)

// Config says where the pool lives and whom it asks.
type Config struct {
	Dir           string        // directory of leases.json and its lock, such as /run/azure-vnet; made if missing
	Source        string        // "auto" (or empty: host agent, then IMDS), "wireserver", "imds", or the absolute path of a file
	QueryURL      string        // asked instead of the source's own URL (with auto: the host agent's); empty: the source's own
	QueryInterval time.Duration // a source is asked again when its answer is this old; 0: 10 s
	CoolDown      time.Duration // how long a released address cools; 0: 30 s; negative: not at all
	Reclaim       bool          // secondary addresses are taken off the host's NIC; the pool only words its errors by it
	Remedy        string        // what an error about an address of the host says about Reclaim; empty: the words of a CNI configuration

	// Links lists the leases that the host's links prove. It is called outside of the lock, before the first address of
	// a new leases.json is lent. The file is new after a boot, when there are no links. It is also new after it was
	// lost, when containers have addresses that no lease tells. nil: no link proves a lease.
	Links func(context.Context) ([]Lease, error)
}

// NIC is one network interface of the VM as Azure describes it.
type NIC struct {
	MAC     string   `json:"mac"`     // lower case with colons: 00:0d:3a:04:75:98
	Primary bool     `json:"primary"` // the VM's primary NIC
	Subnets []Subnet `json:"subnets"`
}

// Secondaries returns the NIC's secondary addresses in all its subnets.
func (n NIC) Secondaries() []netip.Addr {
	var all []netip.Addr
	for _, s := range n.Subnets {
		all = append(all, s.Secondary...)
	}
	return all
}

// Subnet is one subnet of a NIC with the NIC's ipconfigs in it.
type Subnet struct {
	Prefix    netip.Prefix `json:"prefix"`              // without host bits
	Primary   netip.Addr   `json:"primary,omitzero"`    // the NIC's primary address, which is never lent; zero: it lies in another subnet
	Secondary []netip.Addr `json:"secondary,omitempty"` // lendable, ascending
}

// reserves reports whether Azure keeps the address for itself: the first four and the last of each subnet.
func (s Subnet) reserves(a netip.Addr) bool {
	if !a.Is4() || !s.Prefix.Contains(a) {
		return false
	}
	first, is := s.Prefix.Masked().Addr().As4(), a.As4()
	n := binary.BigEndian.Uint32(is[:]) - binary.BigEndian.Uint32(first[:])
	return n < 4 || uint64(n) == 1<<(32-s.Prefix.Bits())-1
}

// Request asks for a lease.
type Request struct {
	Owner    string       // who will hold it: cni/<network>/<containerID>/<ifname> or docker/<poolID>
	MAC      string       // of the NIC whose address is wanted; empty: the first NIC that has Prefix, the primary before others
	Prefix   netip.Prefix // the subnet; zero: the NIC's first
	Range    netip.Prefix // the address is chosen from this part of Prefix; zero: from all of it
	Addr     netip.Addr   // the address that is wanted, in Range or not; zero: one that was never lent, or else the one released longest ago
	Known    bool         // no source is asked: known addresses must do
	Pod      string       // as Lease has it
	Linkless bool         // no link of the host will prove this lease, so only a release ends it: an auxiliary address, or another main plugin's
}

// Lease is an address held by an owner.
type Lease struct {
	Addr     netip.Addr    `json:"-"`
	Owner    string        `json:"owner"`
	MAC      string        `json:"mac"`                // of the NIC that has the address
	Prefix   netip.Prefix  `json:"prefix"`             // subnet of the address
	Since    time.Duration `json:"since"`              // CLOCK_BOOTTIME in ns; Addr, Owner and Since identify a lease
	Pod      string        `json:"pod,omitempty"`      // namespace/name of the Kubernetes pod, for people to read; empty: no pod, or not known
	Linkless bool          `json:"linkless,omitempty"` // as in Request
	Early    bool          `json:"early,omitempty"`    // the address was cooling when it was lent, because no other was left: worth a warning
}

// Holder names the owner in a sentence, with the pod if it is known.
func (l Lease) Holder() string {
	if l.Pod == "" {
		return l.Owner
	}
	return l.Owner + " (pod " + l.Pod + ")"
}

// Pool lends addresses. Its methods may be called by many goroutines and many processes at once.
type Pool struct {
	cfg     Config
	path    string // of leases.json
	sources []source

	// The following read this machine. Tests replace them.
	clock    func() time.Duration      // CLOCK_BOOTTIME
	occupied func() (occupied, error)  // the addresses that the host and its containers have
	host     func() (hostLinks, error) // the host's links and addresses, for a source that flags no primary address
}

const (
	defaultInterval = 10 * time.Second // the release of 2018 asked as often
	defaultCoolDown = 30 * time.Second
)

// New makes a pool, and checks its settings. It does no I/O.
func New(c Config) (*Pool, error) {
	if !filepath.IsAbs(c.Dir) {
		return nil, fmt.Errorf("pool: directory %q is not an absolute path", c.Dir)
	}
	if c.QueryInterval < 0 {
		return nil, fmt.Errorf("pool: query interval %v is negative", c.QueryInterval)
	}
	if c.QueryInterval == 0 {
		c.QueryInterval = defaultInterval
	}
	if c.CoolDown == 0 {
		c.CoolDown = defaultCoolDown
	}
	sources, err := sourcesOf(c.Source, c.QueryURL)
	if err != nil {
		return nil, fmt.Errorf("pool: %w", err)
	}
	return &Pool{
		cfg:      c,
		path:     filepath.Join(c.Dir, "leases.json"),
		sources:  sources,
		clock:    bootTime,
		occupied: readOccupied,
		host:     readHostLinks,
	}, nil
}
