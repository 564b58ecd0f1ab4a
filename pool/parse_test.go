// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// text is NICs in one line each: MAC, * for the primary, subnets, own address
// before the colon, lendable ones after it.
func text(nics []NIC) string {
	var all []string
	for _, n := range nics {
		line := n.MAC
		if n.Primary {
			line += "*"
		}
		for _, s := range n.Subnets {
			line += fmt.Sprintf(" %s %s:", s.Prefix, s.Primary)
			for _, a := range s.Secondary {
				line += " " + a.String()
			}
		}
		all = append(all, strings.ReplaceAll(line, "invalid IP", "-"))
	}
	return strings.Join(all, "\n")
}

func TestWhatIsUnderstood(t *testing.T) {
	seed := func(name string) string {
		b, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	// wrap is an answer with one NIC and these entries in 10.0.0.0/24.
	wrap := func(entries string) string {
		return `<Interfaces><Interface MacAddress="000D3A047598" IsPrimary="true"><IPSubnet Prefix="10.0.0.0/24">` + entries +
			`</IPSubnet></Interface></Interfaces>`
	}
	own := `<IPAddress Address="10.0.0.4" IsPrimary="true"/>`
	imdsNIC := func(mac, addrs, subnets string) string {
		return `{"macAddress":"` + mac + `","ipv4":{"ipAddress":[` + addrs + `],"subnet":[` + subnets + `]}}`
	}
	two := `{"privateIpAddress":"10.0.0.9"},{"privateIpAddress":"10.0.0.7"}`
	for _, test := range []struct {
		name  string
		parse func([]byte) (document, error)
		body  string
		host  hostLinks
		want  string
		notes string // what they say
	}{
		{"host agent, one NIC", parseXML, seed("real-one-nic.xml"), hostLinks{}, "00:22:48:26:3d:bd* 10.240.0.0/16 10.240.0.4:", ""},
		{"host agent, two NICs", parseXML, seed("two-nics.xml"), hostLinks{},
			mac1 + "* 10.0.0.0/24 10.0.0.4: 10.0.0.7\n" + mac2 + " 10.0.1.0/24 10.0.1.4: 10.0.1.5", ""},
		{"file", parseFile, seed("interfaces.json"), hostLinks{}, "00:0d:3a:6e:18:25* 10.0.0.0/24 10.0.0.4: 10.0.0.5", ""},
		{"IMDS", parseIMDS, seed("imds.json"), hostLinks{}, mac1 + "* 10.0.0.0/24 10.0.0.4: 10.0.0.7", ""},
		{"a byte order mark and a declaration", parseXML, "\ufeff<?xml version=\"1.0\" encoding=\"ISO-8859-1\"?>" + wrap(own), hostLinks{},
			mac1 + "* 10.0.0.0/24 10.0.0.4:", ""},
		{"a block of addresses", parseXML, wrap(own + `<IPAddress Address="10.0.0.16/30"/>`), hostLinks{},
			mac1 + "* 10.0.0.0/24 10.0.0.4: 10.0.0.16 10.0.0.17 10.0.0.18 10.0.0.19", ""},
		{"a block that is the whole subnet and more", parseXML, wrap(own + `<IPAddress Address="10.0.0.0/16"/>`), hostLinks{},
			mac1 + "* 10.0.0.0/24 10.0.0.4:", `"10.0.0.0/16"`},
		{"what is no address, or of no subnet", parseXML, wrap(own + `<IPAddress Address="ten"/><IPAddress Address="10.0.9.9"/><IPAddress Address="10.0.0.5"/>`), hostLinks{},
			mac1 + "* 10.0.0.0/24 10.0.0.4: 10.0.0.5", `"ten" … "10.0.9.9"`},
		{"out of order, and twice", parseXML, wrap(`<IPAddress Address="10.0.0.9"/>` + own + `<IPAddress Address="10.0.0.5"/><IPAddress Address="10.0.0.9"/>`), hostLinks{},
			mac1 + "* 10.0.0.0/24 10.0.0.4: 10.0.0.5 10.0.0.9", ""},
		{"addresses that Azure reserves", parseXML, wrap(`<IPAddress Address="10.0.0.0"/><IPAddress Address="10.0.0.1"/><IPAddress Address="10.0.0.3"/>` + own + `<IPAddress Address="10.0.0.254"/><IPAddress Address="10.0.0.255"/>`), hostLinks{},
			mac1 + "* 10.0.0.0/24 10.0.0.4: 10.0.0.254", "10.0.0.0 of NIC … 10.0.0.1 of NIC … 10.0.0.3 of NIC … 10.0.0.255 of NIC … Azure reserves it"},
		{"reserved addresses in a block", parseFile, `{"Interfaces":[{"MacAddress":"000D3A047598","IPSubnets":[{"Prefix":"10.0.0.0/29","IPAddresses":[{"Address":"10.0.0.4","IsPrimary":true},{"Address":"10.0.0.0/29"}]}]}]}`, hostLinks{},
			mac1 + "* 10.0.0.0/29 10.0.0.4: 10.0.0.5 10.0.0.6", "10.0.0.3 … 10.0.0.7"},
		{"blanks in a prefix, an address and a MAC", parseXML, strings.NewReplacer("10.0.0.0/24", " 10.0.0.0 / 24\n", "10.0.0.4", " 10.0.0.4\t", "000D3A047598", " 00 0D 3A 04 75 98 ").Replace(wrap(own)), hostLinks{},
			mac1 + "* 10.0.0.0/24 10.0.0.4:", ""},
		{"IMDS, blanks in what it says", parseIMDS, `{"interface":[` + imdsNIC(mac1, `{"privateIpAddress":"10.0.0.4 "},{"privateIpAddress":" 10.0.0.7"}`, `{"address":" 10.0.0.0","prefix":" 24 "}`) + `]}`, hostLinks{},
			mac1 + "* 10.0.0.0/24 10.0.0.4: 10.0.0.7", ""},
		{"IMDS, a blank prefix", parseIMDS, `{"interface":[` + imdsNIC(mac1, two, `{"address":"10.0.0.0","prefix":" "}`) + `]}`, hostLinks{},
			mac1 + "* 10.0.0.0/24 10.0.0.9: 10.0.0.7", ""},
		{"IMDS, a byte order mark", parseIMDS, "\ufeff" + seed("imds.json"), hostLinks{}, mac1 + "* 10.0.0.0/24 10.0.0.4: 10.0.0.7", ""},
		{"file, a byte order mark and blanks before it", parseFile, " \r\n\ufeff" + seed("interfaces.json"), hostLinks{}, "00:0d:3a:6e:18:25* 10.0.0.0/24 10.0.0.4: 10.0.0.5", ""},
		{"IMDS, asked for the whole instance", parseIMDS, seed("imds-instance.json"), hostLinks{}, mac1 + "* 10.0.0.0/24 10.0.0.4: 10.0.0.7", ""},
		{"IMDS, asked for the interfaces", parseIMDS, seed("imds-interfaces.json"), hostLinks{}, mac1 + "* 10.0.0.0/24 10.0.0.4: 10.0.0.7\n" + mac2 + " 10.0.1.0/24 10.0.1.4: 10.0.1.5", ""},
		{"IMDS, asked for one interface", parseIMDS, seed("imds-interface.json"), hostLinks{}, mac1 + "* 10.0.0.0/24 10.0.0.4: 10.0.0.7", ""},
		{"a list that has one NIC of this VM", parseXML, seed("two-nics.xml"), hostLinks{MACs: []string{"fe:42:00:00:00:01", mac2}},
			mac1 + "* 10.0.0.0/24 10.0.0.4: 10.0.0.7\n" + mac2 + " 10.0.1.0/24 10.0.1.4: 10.0.1.5", ""},
		{"no prefix length", parseXML, strings.Replace(wrap(own), "/24", "", 1), hostLinks{}, mac1 + "* 10.0.0.0/24 10.0.0.4:", ""},
		{"IPv6 beside IPv4", parseXML, strings.Replace(wrap(own), "<IPSubnet", `<IPSubnet Prefix="fd00::/64"><IPAddress Address="fd00::4"/></IPSubnet><IPSubnet`, 1), hostLinks{},
			mac1 + "* 10.0.0.0/24 10.0.0.4:", ""},
		{"the primary NIC last, and one without a MAC", parseXML, `<Interfaces><Interface MacAddress="00-0D-3A-03-C5-AB"><IPSubnet Prefix="10.0.1.0/24"><IPAddress Address="10.0.1.4" IsPrimary="True"/></IPSubnet></Interface>` +
			`<Interface MacAddress="x"/>` + strings.TrimPrefix(wrap(own), "<Interfaces>"), hostLinks{},
			mac1 + "* 10.0.0.0/24 10.0.0.4:\n" + mac2 + " 10.0.1.0/24 10.0.1.4:", `"x" is no MAC`},
		{"an address that another NIC has as its own", parseXML, `<Interfaces><Interface MacAddress="000D3A03C5AB"><IPSubnet Prefix="10.0.0.0/24"><IPAddress Address="10.0.0.10" IsPrimary="1"/><IPAddress Address="10.0.0.4"/></IPSubnet></Interface>` +
			strings.TrimPrefix(wrap(own+`<IPAddress Address="10.0.0.10"/>`), "<Interfaces>"), hostLinks{},
			mac1 + "* 10.0.0.0/24 10.0.0.4:\n" + mac2 + " 10.0.0.0/24 10.0.0.10:", "10.0.0.4 … 10.0.0.10"},
		{"no primary flagged: the first", parseXML, wrap(`<IPAddress Address="10.0.0.9"/><IPAddress Address="10.0.0.7"/>`), hostLinks{},
			mac1 + "* 10.0.0.0/24 10.0.0.9: 10.0.0.7", ""},
		{"IMDS, the host holds another than the first", parseIMDS, `{"interface":[` + imdsNIC(mac1, two, `{"address":"10.0.0.0","prefix":"24"}`) + `]}`,
			hostLinks{Addrs: map[string][]netip.Addr{mac1: {addr("10.0.0.7")}}}, mac1 + "* 10.0.0.0/24 10.0.0.7: 10.0.0.9", "lists 10.0.0.9 first … 10.0.0.7"},
		{"IMDS, the host holds all, as under cloud-init", parseIMDS, `{"interface":[` + imdsNIC(mac1, two, `{"address":"10.0.0.0","prefix":"24"}`) + `]}`,
			hostLinks{Addrs: map[string][]netip.Addr{mac1: {addr("10.0.0.7"), addr("10.0.0.9")}}}, mac1 + "* 10.0.0.0/24 10.0.0.9: 10.0.0.7", ""},
		{"IMDS, no prefix, colons, the default route by the second NIC", parseIMDS,
			`{"interface":[` + imdsNIC(mac2, `{"privateIpAddress":"10.0.1.4"}`, `{"address":"10.0.1.0"}`) + `,` + imdsNIC(mac1, two, `{"address":"10.0.0.0","prefix":24}`) + `]}`,
			hostLinks{Default: mac1}, mac1 + "* 10.0.0.0/24 10.0.0.9: 10.0.0.7\n" + mac2 + " 10.0.1.0/24 10.0.1.4:", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			d, err := test.parse([]byte(test.body))
			if err != nil {
				t.Fatal(err)
			}
			nics, notes, err := interpretDocument(d, test.host)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, text(nics)); diff != "" {
				t.Errorf("NICs (-want +got):\n%s", diff)
			}
			for _, say := range strings.Split(test.notes, " … ") {
				if !strings.Contains(strings.Join(notes, "\n"), say) {
					t.Errorf("notes do not say %q: %q", say, notes)
				}
			}
			if test.notes == "" && len(notes) > 0 {
				t.Errorf("notes: %q", notes)
			}
		})
	}
}

// What must hold of every answer that is taken, whatever was sent.
func check(t *testing.T, d document) {
	nics, notes, err := interpretDocument(d, hostLinks{})
	if err != nil {
		return
	}
	if len(nics) == 0 || len(notes) > mostNotes {
		t.Fatalf("%d NICs, %d notes", len(nics), len(notes))
	}
	seen := map[netip.Addr]bool{}
	for i, n := range nics {
		if n.Primary != (i == 0) || len(n.Subnets) == 0 {
			t.Fatalf("NIC %d is %+v", i, n)
		}
		if mac, err := parseMAC(n.MAC); mac != n.MAC || err != nil {
			t.Fatalf("MAC %q: %v", n.MAC, err)
		}
		for _, s := range n.Subnets {
			if s.Prefix != s.Prefix.Masked() || !slices.IsSortedFunc(s.Secondary, netip.Addr.Compare) {
				t.Fatalf("subnet %+v", s)
			}
			for _, a := range s.Secondary {
				if seen[a] || a == s.Primary || !s.Prefix.Contains(a) || s.reserves(a) {
					t.Fatalf("address %s of %s: seen %v", a, s.Prefix, seen[a])
				}
				seen[a] = true
			}
		}
	}
	body, err := json.Marshal(nics)
	var again []NIC
	if err == nil {
		err = json.Unmarshal(body, &again)
	}
	if diff := cmp.Diff(nics, again, compareState); err != nil || diff != "" {
		t.Fatalf("%v\n%s", err, diff)
	}
}

func fuzz(f *testing.F, parse func([]byte) (document, error), seeds string) {
	files, err := filepath.Glob(filepath.Join("testdata", seeds))
	if err != nil || len(files) == 0 {
		f.Fatal(err, files)
	}
	for _, name := range files {
		body, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(body)
		f.Add(body[:len(body)/2])
	}
	f.Add([]byte("<!DOCTYPE html><html>"))
	f.Fuzz(func(t *testing.T, body []byte) {
		if d, err := parse(body); err == nil {
			check(t, d)
		}
	})
}

func FuzzXML(f *testing.F)  { fuzz(f, parseXML, "*.xml") }
func FuzzIMDS(f *testing.F) { fuzz(f, parseIMDS, "imds*.json") }
func FuzzFile(f *testing.F) { fuzz(f, parseFile, "interfaces*.json") }
