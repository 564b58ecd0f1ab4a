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
	"net/netip"
	"time"
)

// Config says where the pool lives and whom it asks.
type Config struct {
	Dir           string        // directory of leases.json and its lock, such as /run/azure-vnet; made if missing
	Source        string        // "auto" (or empty: host agent, then IMDS), "wireserver", "imds", or the absolute path of a file
	QueryURL      string        // asked instead of the source's own URL; empty: the source's own
	QueryInterval time.Duration // age at which a known answer is asked again; 0: 10 s
	CoolDown      time.Duration // how long a released address rests before it is given out of turn; 0: 30 s; negative: none
	Reclaim       bool          // the host gives up secondary addresses it holds (see bridge.Host.Reclaim): words the errors only
}

// NIC is one network interface of the VM as Azure describes it.
type NIC struct {
	MAC     string   `json:"mac"`     // lower case with colons: 00:0d:3a:04:75:98
	Primary bool     `json:"primary"` // the VM's primary NIC
	Subnets []Subnet `json:"subnets"`
}

// Subnet is one subnet of a NIC with the NIC's ipconfigs in it.
type Subnet struct {
	Prefix    netip.Prefix `json:"prefix"`              // masked
	Primary   netip.Addr   `json:"primary,omitzero"`    // the NIC's own address: never lent; zero if it lies in another subnet
	Secondary []netip.Addr `json:"secondary,omitempty"` // lendable, ascending
}

// Request asks for a lease.
type Request struct {
	Owner    string       // who will hold it: cni/<network>/<containerID>/<ifname> or docker/<poolID>
	MAC      string       // NIC to take from; empty: the primary
	Prefix   netip.Prefix // subnet to take from; zero: the NIC's first
	Range    netip.Prefix // bounds the choice within Prefix; zero: none
	Addr     netip.Addr   // this address and no other; zero: the one freed longest ago
	Linkless bool         // no host link will prove this lease: it ends by Release alone (an auxiliary address, a foreign main plugin)
}

// Lease is an address held by an owner.
type Lease struct {
	Addr     netip.Addr    `json:"-"`
	Owner    string        `json:"owner"`
	MAC      string        `json:"mac"`                // of the NIC the address belongs to
	Prefix   netip.Prefix  `json:"prefix"`             // subnet of the address
	Since    time.Duration `json:"since"`              // CLOCK_BOOTTIME, ns; with Owner and Addr the lease's identity
	Linkless bool          `json:"linkless,omitempty"` // as in Request
}

// Pool lends addresses. Its methods may be called from many goroutines and
// many processes at once.
type Pool struct {
	cfg Config
}

var _ = context.Background
