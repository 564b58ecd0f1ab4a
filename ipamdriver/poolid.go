// Copyright (c) The azure-vnet authors. MIT licence.

package ipamdriver

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"net/netip"
	"regexp"
	"strings"
)

// poolID says all that a later call needs. After a reboot an engine asks for addresses of a pool that it never requests
// again.
type poolID struct {
	mac    string       // of the NIC, lower case with colons
	prefix netip.Prefix // the NIC's subnet
	within netip.Prefix // --ip-range; zero: none
	serial string       // 12 hex digits, which differ between two networks of one subnet
}

var (
	macShape    = regexp.MustCompile(`^[0-9a-f]{12}$`)
	serialShape = regexp.MustCompile(`^[0-9a-f]{12}$`)
)

// newSerial returns a random serial.
func newSerial() string {
	var b [6]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// String returns <mac>-<prefix>-<range>-<serial>, without colons and slashes.
func (id poolID) String() string {
	within := ""
	if id.within.IsValid() {
		within = escapePrefix(id.within)
	}
	return strings.Join([]string{strings.ReplaceAll(id.mac, ":", ""), escapePrefix(id.prefix), within, id.serial}, "-")
}

// OwnerPrefix begins the owner of every lease of Docker's. The package driver has the same one.
const OwnerPrefix = "docker/"

// owner returns the owner of the pool's leases.
func (id poolID) owner() string { return OwnerPrefix + id.String() }

// gateway returns Azure's gateway, which is always the first address of a subnet.
func (id poolID) gateway() netip.Addr { return id.prefix.Addr().Next() }

// parsePoolID reads what String writes, and nothing else: a PoolID becomes part of an owner.
func parsePoolID(s string) (poolID, error) {
	bad := func(why string) (poolID, error) {
		return poolID{}, fmt.Errorf("pool %.80q is none of this driver's: %s", s, why)
	}
	part := strings.Split(s, "-")
	if len(part) != 4 {
		return bad("it is not <mac>-<prefix>-<range>-<serial>")
	}
	if !macShape.MatchString(part[0]) {
		return bad("its first part is not a MAC")
	}
	if !serialShape.MatchString(part[3]) {
		return bad("its last part is not a serial")
	}
	prefix, err := unescapePrefix(part[1])
	if err != nil {
		return bad("its second part is not a subnet")
	}
	id := poolID{mac: withColons(part[0]), prefix: prefix, serial: part[3]}
	if part[2] != "" {
		if id.within, err = unescapePrefix(part[2]); err != nil || !containsPrefix(prefix, id.within) {
			return bad("its third part is not a range of the subnet")
		}
	}
	if id.String() != s {
		return bad("it is not in canonical form")
	}
	return id, nil
}

// escapePrefix returns a prefix with an underscore in place of the slash.
func escapePrefix(p netip.Prefix) string { return strings.ReplaceAll(p.String(), "/", "_") }

// unescapePrefix reads what escapePrefix writes.
func unescapePrefix(s string) (netip.Prefix, error) {
	return parseExactPrefix(strings.ReplaceAll(s, "_", "/"))
}

// withColons returns 12 hex digits as a MAC.
func withColons(mac string) string {
	var b strings.Builder
	for i := 0; i < len(mac); i += 2 {
		if i > 0 {
			b.WriteByte(':')
		}
		b.WriteString(mac[i : i+2])
	}
	return b.String()
}

// parseExactPrefix reads an IPv4 prefix without host bits.
func parseExactPrefix(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil:
		return netip.Prefix{}, fmt.Errorf("%.80q is not a CIDR such as 10.240.0.0/16", s)
	case !p.Addr().Is4():
		return netip.Prefix{}, fmt.Errorf("%s: IPv6 is not served yet", p)
	case p != p.Masked():
		return netip.Prefix{}, fmt.Errorf("%s has host bits set: write %s", p, p.Masked())
	}
	return p, nil
}

// containsPrefix reports whether inner lies in outer.
func containsPrefix(outer, inner netip.Prefix) bool {
	return outer.Bits() <= inner.Bits() && outer.Contains(inner.Addr())
}
