// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"bytes"
	"cmp"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// document is an answer of a source. The host agent sends it as XML, and a file has it as JSON. An answer of IMDS is
// converted to the same form, in which no address is flagged as primary.
type document struct {
	XMLName xml.Name `xml:"Interfaces" json:"-"`
	NICs    []docNIC `xml:"Interface" json:"Interfaces"`
}

type docNIC struct {
	MAC     string      `xml:"MacAddress,attr" json:"MacAddress"`
	Primary loose       `xml:"IsPrimary,attr" json:"IsPrimary"`
	Subnets []docSubnet `xml:"IPSubnet" json:"IPSubnets"`
}

type docSubnet struct {
	Prefix string    `xml:"Prefix,attr" json:"Prefix"`
	Addrs  []docAddr `xml:"IPAddress" json:"IPAddresses"`
}

type docAddr struct {
	Address string `xml:"Address,attr" json:"Address"`
	Primary loose  `xml:"IsPrimary,attr" json:"IsPrimary"`
}

// imdsDocument is an answer of IMDS, which may be asked at several levels of its tree: /metadata/instance has a
// network, /metadata/instance/network has a list of interfaces, and …/interface/<number> is one interface. The list
// alone, …/interface, is a JSON array.
type imdsDocument struct {
	Network struct {
		NICs []imdsNIC `json:"interface"`
	} `json:"network"`
	NICs []imdsNIC `json:"interface"`
	imdsNIC
}

type imdsNIC struct {
	MAC  string `json:"macAddress"`
	IPv4 struct {
		Addrs []struct {
			Private string `json:"privateIpAddress"`
		} `json:"ipAddress"`
		Subnets []struct {
			Address string `json:"address"`
			Prefix  loose  `json:"prefix"`
		} `json:"subnet"`
	} `json:"ipv4"`
}

// allNICs returns the interfaces, at whatever level they are.
func (d imdsDocument) allNICs() []imdsNIC {
	nics := append(d.Network.NICs, d.NICs...)
	if d.MAC != "" {
		nics = append(nics, d.imdsNIC)
	}
	return nics
}

// loose is a JSON string, number or boolean, as text.
type loose string

func (l *loose) UnmarshalJSON(b []byte) error {
	var v any
	if err := json.Unmarshal(b, &v); err != nil {
		return err
	}
	switch v := v.(type) {
	case string:
		*l = loose(v)
	case bool, float64:
		*l = loose(b)
	}
	return nil
}

// isTrue reports whether the text is a true boolean.
func (l loose) isTrue() bool {
	yes, _ := strconv.ParseBool(strings.ToLower(strings.TrimSpace(string(l))))
	return yes
}

// trimBody returns a body without its byte order mark and the blanks around it.
func trimBody(body []byte) []byte {
	return bytes.TrimSpace(bytes.TrimPrefix(bytes.TrimSpace(body), []byte("\ufeff")))
}

// withoutBlanks returns a value without its blanks. Some hosts and people put blanks into prefixes and addresses.
func withoutBlanks(text string) string { return strings.Join(strings.Fields(text), "") }

func parseXML(body []byte) (d document, err error) {
	x := xml.NewDecoder(bytes.NewReader(trimBody(body)))
	x.CharsetReader = func(_ string, r io.Reader) (io.Reader, error) { return r, nil } // the text is ASCII, whatever charset it declares
	if err := x.Decode(&d); err != nil {
		return document{}, wrongFormat(body, "XML", err)
	}
	return d, nil
}

func parseFile(body []byte) (d document, err error) {
	if err := json.Unmarshal(trimBody(body), &d); err != nil {
		return document{}, wrongFormat(body, "JSON", err)
	}
	return d, nil
}

func parseIMDS(body []byte) (document, error) {
	var told imdsDocument
	var into any = &told
	if bytes.HasPrefix(trimBody(body), []byte("[")) {
		into = &told.NICs
	}
	if err := json.Unmarshal(trimBody(body), into); err != nil {
		return document{}, wrongFormat(body, "JSON", err)
	}
	var d document
	for _, n := range told.allNICs() {
		nic := docNIC{MAC: n.MAC}
		var prefixes []netip.Prefix
		for _, s := range n.IPv4.Subnets {
			text := s.Address
			if length := withoutBlanks(string(s.Prefix)); length != "" {
				text += "/" + length
			}
			prefix, _ := parseSubnetMasked(text) // an invalid prefix contains no address; interpretDocument notes it
			prefixes = append(prefixes, prefix)
			nic.Subnets = append(nic.Subnets, docSubnet{Prefix: text})
		}
		for _, a := range n.IPv4.Addrs {
			addr, _ := netip.ParseAddr(withoutBlanks(a.Private))
			in := max(0, slices.IndexFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(addr) }))
			if len(nic.Subnets) > 0 { // an address in no subnet goes to the first one; interpretDocument notes it
				nic.Subnets[in].Addrs = append(nic.Subnets[in].Addrs, docAddr{Address: a.Private})
			}
		}
		d.NICs = append(d.NICs, nic)
	}
	return d, nil
}

// wrongFormat returns the error of an answer that is not in the format want. It says what came instead.
func wrongFormat(body []byte, want string, err error) error {
	head := trimBody(body)
	if len(head) == 0 {
		return fmt.Errorf("it sent nothing, not %s", want)
	}
	lower := strings.ToLower(string(head[:min(len(head), 15)]))
	head = head[:min(len(head), 80)]
	if strings.HasPrefix(lower, "<!doctype html") || strings.HasPrefix(lower, "<html") {
		return fmt.Errorf("it sent HTML, not %s: %q", want, head)
	}
	if errors.Is(err, io.ErrUnexpectedEOF) || strings.Contains(err.Error(), "unexpected EOF") || strings.Contains(err.Error(), "unexpected end") {
		return fmt.Errorf("it sent %s that ends too early, after %d bytes: %q…", want, len(body), head)
	}
	return fmt.Errorf("it sent %q…, not the %s that was expected: %w", head, want, err)
}

// parseMAC reads 12 hex digits, with or without separators, and returns them as 00:0d:3a:04:75:98.
func parseMAC(text string) (string, error) {
	digits := strings.ToLower(strings.NewReplacer(":", "", "-", "").Replace(withoutBlanks(text)))
	if _, err := strconv.ParseUint(digits, 16, 48); err != nil || len(digits) != 12 {
		return "", fmt.Errorf("%q is no MAC address such as 00:0d:3a:04:75:98", text)
	}
	var pairs []string
	for pair := range slices.Chunk([]byte(digits), 2) {
		pairs = append(pairs, string(pair))
	}
	return strings.Join(pairs, ":"), nil
}

// parseSubnetMasked reads a prefix, and clears its host bits. A prefix without a length has 24, as IMDS documents it.
func parseSubnetMasked(text string) (netip.Prefix, error) {
	text = withoutBlanks(text)
	if !strings.Contains(text, "/") {
		text += "/24"
	}
	p, err := netip.ParsePrefix(text)
	return p.Masked(), err
}

// parseBlock reads an address or a block of addresses: Azure may assign a NIC all of 10.0.0.16/28. A block larger than
// a /24 is refused.
func parseBlock(text string) (netip.Prefix, error) {
	text = withoutBlanks(text)
	if addr, err := netip.ParseAddr(text); err == nil {
		return netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	p, err := netip.ParsePrefix(text)
	if err == nil && p.Bits() < p.Addr().BitLen()-8 {
		err = errors.New("it is a block larger than a /24, and no NIC has so many addresses")
	}
	return p, err
}

// sortPrimaryFirst moves the primary NIC to the front. Every search through a list of NICs relies on it.
func sortPrimaryFirst(nics []NIC) {
	slices.SortStableFunc(nics, func(a, b NIC) int {
		rank := map[bool]int{true: 0, false: 1}
		return cmp.Compare(rank[a.Primary], rank[b.Primary])
	})
}
