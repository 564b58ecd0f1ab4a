// Copyright (c) The azure-vnet authors. MIT licence.

// Package pool is the addresses that Azure gave this VM and who holds each:
// the sources that tell (host agent, IMDS, file) and the leases in
// <run>/azure-vnet/leases.json. It is not the network: it makes no link and
// knows neither the bridge, nor Docker, nor CNI.
//
// No process owns the pool. Every call locks the file, reads, changes, renames
// and unlocks; the source is asked, and the host's addresses are read, outside
// the lock. SIGKILL between any two lines leaves at worst a leaked lease, which
// Collect heals, and never an address that two hold.
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

// What a caller branches on. The error around each says what, why and what to do.
var (
	ErrExhausted = errors.New("no free address")                // Lease: nothing is left, not even a cooling address
	ErrInUse     = errors.New("address in use")                 // Lease: the address that was asked for is held
	ErrNotOurs   = errors.New("not ours to lend")               // the NIC, subnet or address is not this VM's, or not lendable
	ErrGone      = errors.New("lease gone")                     // Confirm, Keep: the lease is no longer held as it was given
	ErrSource    = errors.New("no word of this VM's addresses") // the source failed and nothing is known from before
)

// Config says where the pool lives and whom it asks.
type Config struct {
	Dir           string        // directory of leases.json and its lock, such as /run/azure-vnet; made if missing
	Source        string        // "auto" (or empty: host agent, then IMDS), "wireserver", "imds", or the absolute path of a file
	QueryURL      string        // asked instead of the source's own URL (with auto: the host agent's); empty: the source's own
	QueryInterval time.Duration // age at which a known answer is asked again; 0: 10 s
	CoolDown      time.Duration // how long a released address rests before it is given out of turn; 0: 30 s; negative: none
	Reclaim       bool          // the host gives up secondary addresses it holds (see bridge.Host.Reclaim): words the errors only
	Remedy        string        // what an error says about Reclaim: what it does if it is on, else how to set it; empty: the words of a CNI configuration

	// Links lists the leases that the host's links prove. It is asked, outside
	// the lock, before the first address is lent from a new leases.json: at boot,
	// when there are none, and after the file was lost, when containers hold
	// addresses that the file no longer knows. nil: nobody can tell.
	Links func(context.Context) ([]Lease, error)
}

// NIC is one network interface of the VM as Azure describes it.
type NIC struct {
	MAC     string   `json:"mac"`     // lower case with colons: 00:0d:3a:04:75:98
	Primary bool     `json:"primary"` // the VM's primary NIC
	Subnets []Subnet `json:"subnets"`
}

// Secondaries are the NIC's lendable addresses in all its subnets.
func (n NIC) Secondaries() []netip.Addr {
	var all []netip.Addr
	for _, s := range n.Subnets {
		all = append(all, s.Secondary...)
	}
	return all
}

// Subnet is one subnet of a NIC with the NIC's ipconfigs in it.
type Subnet struct {
	Prefix    netip.Prefix `json:"prefix"`              // masked
	Primary   netip.Addr   `json:"primary,omitzero"`    // the NIC's own address: never lent; zero if it lies in another subnet
	Secondary []netip.Addr `json:"secondary,omitempty"` // lendable, ascending
}

// reserves reports whether Azure keeps an address of the subnet for itself: the first
// four and the last.
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
	MAC      string       // NIC to take from; empty: the one that has Prefix, the primary first
	Prefix   netip.Prefix // subnet to take from; zero: the NIC's first
	Range    netip.Prefix // bounds the choice within Prefix; zero: none
	Addr     netip.Addr   // this address and no other, in Range or not; zero: one never used, else the one freed longest ago
	Known    bool         // as is known now: no source is asked
	Pod      string       // as Lease has it
	Linkless bool         // no host link will prove this lease: it ends by Release alone (an auxiliary address, a foreign main plugin)
}

// Lease is an address held by an owner.
type Lease struct {
	Addr     netip.Addr    `json:"-"`
	Owner    string        `json:"owner"`
	MAC      string        `json:"mac"`                // of the NIC the address belongs to
	Prefix   netip.Prefix  `json:"prefix"`             // subnet of the address
	Since    time.Duration `json:"since"`              // CLOCK_BOOTTIME, ns; with Owner and Addr the lease's identity
	Pod      string        `json:"pod,omitempty"`      // namespace/name of the pod that it is for, for people to read; empty: not known, or no pod
	Linkless bool          `json:"linkless,omitempty"` // as in Request
	Early    bool          `json:"early,omitempty"`    // given while it cooled, since nothing else was left: worth a warning
}

// Holder names the owner in a sentence, with the pod if it is known.
func (l Lease) Holder() string {
	if l.Pod == "" {
		return l.Owner
	}
	return l.Owner + " (pod " + l.Pod + ")"
}

// Pool lends addresses. Its methods may be called from many goroutines and
// many processes at once.
type Pool struct {
	cfg     Config
	path    string // of leases.json
	sources []source

	// Of this machine; tests put others in their place.
	clock    func() time.Duration     // CLOCK_BOOTTIME
	occupied func() (occupied, error) // addresses that something of the host has
	host     func() (host, error)     // what tells primaries apart where the source does not
}

const (
	defaultInterval = 10 * time.Second // as often as the 2018 release asked
	defaultCoolDown = 30 * time.Second
)

// New makes a pool of these settings, which it checks. It does no I/O.
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
		host:     readHost,
	}, nil
}
