// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"azurevnet/bridge"
)

// IPAMType is the name of our own IPAM plugin.
const IPAMType = "azure-vnet-ipam"

// azureStackFile is where the nodes of an Azure Stack have their addresses.
const azureStackFile = "/etc/kubernetes/interfaces.json"

// oldest is the version of a configuration that names none.
const oldest = "0.1.0"

// Conf is a network's configuration with what the runtime adds to it. Unknown
// keys are passed over: runtimes add their own.
type Conf struct {
	CNIVersion string
	Network    string // name

	// Of the main plugin.
	Master string      // the NIC, by name or MAC; empty: the VM's primary
	Mode   bridge.Mode // empty: bridge.ModeBridge
	Bridge string      // its name; empty: see bridge.Spec, or the mode is transparent
	MTU    int         // bytes, of the container's interface; 0: the NIC's
	Policy bridge.Policy
	MAC    net.HardwareAddr // of the container's interface; nil: derived from its address
	Ports  []bridge.PublishedPort
	DNS    types.DNS

	IPAM      IPAM
	Reclaim   bool       // addresses that the host holds are taken from it when no other is left
	Addr      netip.Addr // asked for; zero: any
	AddrBy    string     // the key that asks for Addr, as an error names it
	prev      json.RawMessage
	valid     []types.GCAttachment
	validSaid bool
}

// IPAM is where the address comes from.
type IPAM struct {
	Type     string
	Subnet   netip.Prefix  // zero: the NIC's first
	Source   string        // as pool.Config has it
	QueryURL string        // empty: the source's own
	Interval time.Duration // 0: the pool's
}

// file is the configuration as it is written.
type file struct {
	CNIVersion string
	Name       string
	Reclaim    onOff
	LogLevel   string
	LogTarget  string
	IPAM       fileIPAM        `json:"-"` // read when it is ours
	RawIPAM    json.RawMessage `json:"ipam"`

	Args struct {
		CNI wishes `json:"cni"`
	} `json:"args"`
	RuntimeConfig wishes `json:"runtimeConfig"`
	PrevResult    json.RawMessage
	Valid         json.RawMessage `json:"cni.dev/valid-attachments"`
	Attached      json.RawMessage `json:"cni.dev/attachments"`
}

// fileMain is the main plugin's part. Another's may have these keys with values
// of its own.
type fileMain struct {
	Mode     bridge.Mode `json:"mode"`
	Bridge   string      `json:"bridge"`
	Master   string      `json:"master"`
	MTU      number
	SNAT     *onOff
	Direct   list
	Metadata *onOff
	DNS      types.DNS

	RuntimeConfig struct {
		PortMappings []mapping `json:"portMappings"`
		DNS          struct {
			Servers  []string `json:"servers"`
			Searches []string `json:"searches"`
			Options  []string `json:"options"`
		} `json:"dns"`
	} `json:"runtimeConfig"`
}

type fileIPAM struct {
	Type          string `json:"type"`
	Subnet        string `json:"subnet"`
	IPAddress     string `json:"ipAddress"`
	Environment   string `json:"environment"`
	QueryURL      string `json:"queryUrl"`
	QueryInterval number
}

// readName reads no more than DEL and an error need.
func readName(stdin []byte) Conf {
	var f struct {
		CNIVersion string
		Name       string
		IPAM       json.RawMessage
	}
	if json.Unmarshal(stdin, &f) == nil { // else skel says what is wrong
		f.CNIVersion = cmp.Or(f.CNIVersion, oldest)
	}
	return Conf{CNIVersion: f.CNIVersion, Network: f.Name, IPAM: IPAM{Type: ipamType(f.IPAM)}}
}

// ipamType is "" where there is none.
func ipamType(raw json.RawMessage) string {
	var ipam struct{ Type string }
	_ = json.Unmarshal(raw, &ipam)
	return ipam.Type
}

// readConf reads all of it. args is CNI_ARGS.
func readConf(stdin []byte, args string, main bool) (Conf, error) {
	var f file
	if err := json.Unmarshal(stdin, &f); err != nil {
		return readName(stdin), wrong(types.ErrInvalidNetworkConfig, "the network configuration: %v", wordKind(err))
	}
	c := Conf{CNIVersion: cmp.Or(f.CNIVersion, oldest), Network: f.Name, Reclaim: bool(f.Reclaim), prev: f.PrevResult}
	f.IPAM.Type = ipamType(f.RawIPAM)
	err := f.logs()
	if err == nil && f.IPAM.Type == IPAMType { // another's is passed on unread
		if err = json.Unmarshal(f.RawIPAM, &f.IPAM); err != nil {
			err = fmt.Errorf("ipam: %w", wordKind(err))
		}
	}
	if err == nil && main {
		err = c.readMain(stdin, f.IPAM.Type)
	}
	if err == nil {
		c.IPAM, err = f.IPAM.read()
	}
	if err == nil {
		err = c.readAttachments(&f)
	}
	if err != nil {
		return c, wrong(types.ErrInvalidNetworkConfig, "the configuration of network %s: %v", f.Name, err)
	}
	return c, c.readWishes(args, &f)
}

// wordKind names the key whose value is of the wrong kind, as the configuration spells it.
func wordKind(err error) error {
	var bad *json.UnmarshalTypeError
	if errors.As(err, &bad) && bad.Field != "" {
		return fmt.Errorf("%s is a %s, which it cannot be", bad.Field, bad.Value)
	}
	return err
}

// readMain reads the main plugin's part.
func (c *Conf) readMain(stdin []byte, ipam string) error {
	var f fileMain
	if err := json.Unmarshal(stdin, &f); err != nil {
		return wordKind(err)
	}
	if f.Mode != "" && !slices.Contains(bridge.Modes, f.Mode) {
		return fmt.Errorf(`mode %.40q is not served: write "mode": "bridge" or leave it out, or "transparent" where a policy engine matches each container's own interface`, f.Mode)
	}
	if ipam == "" {
		return fmt.Errorf(`ipam.type is missing: write "ipam": {"type": %q}`, IPAMType)
	}
	if strings.ContainsAny(ipam, `/\`) {
		return fmt.Errorf("ipam.type %q is a path and not the name of a plugin", ipam)
	}
	if f.MTU != 0 && (f.MTU < 68 || f.MTU > 65535) {
		return fmt.Errorf("mtu is a number of bytes from 68 to 65535, and not %d", f.MTU)
	}
	if f.Bridge != "" {
		if err := bridge.CheckBridgeName(f.Bridge); err != nil {
			return fmt.Errorf("bridge %.40q: %w", f.Bridge, err)
		}
	}
	if _, bad := net.ParseMAC(f.Master); f.Master != "" && bad != nil {
		if err := bridge.CheckLinkName(f.Master); err != nil {
			return fmt.Errorf("master %.40q is neither a MAC nor a name: %w", f.Master, err)
		}
	}
	c.Master, c.Mode, c.Bridge, c.MTU = f.Master, f.Mode, f.Bridge, int(f.MTU)
	if c.Mode == bridge.ModeTransparent {
		c.Bridge = "" // the shipped configuration names one, and the mode alone is changed in it
	}
	c.Policy = bridge.Policy{SNAT: f.SNAT == nil || bool(*f.SNAT), NoMetadata: f.Metadata != nil && !bool(*f.Metadata)}
	for _, text := range f.Direct {
		p, err := netip.ParsePrefix(text)
		if err != nil || !p.Addr().Is4() {
			return fmt.Errorf("direct has %.40q, which is not an IPv4 CIDR such as 10.0.0.0/8", text)
		}
		c.Policy.Direct = append(c.Policy.Direct, p.Masked())
	}
	c.DNS = f.DNS
	if dns := f.RuntimeConfig.DNS; len(dns.Servers) > 0 {
		c.DNS.Nameservers = dns.Servers
	}
	if dns := f.RuntimeConfig.DNS; len(dns.Searches) > 0 {
		c.DNS.Search = dns.Searches
	}
	if dns := f.RuntimeConfig.DNS; len(dns.Options) > 0 {
		c.DNS.Options = dns.Options
	}
	for _, m := range f.RuntimeConfig.PortMappings {
		p, served, err := m.port()
		if err != nil {
			return fmt.Errorf("runtimeConfig.portMappings: port %d of the container: %w", m.ContainerPort, err)
		}
		if served {
			c.Ports = append(c.Ports, p)
		}
	}
	return nil
}

// read reads the part for IPAM, as far as it is ours.
func (f fileIPAM) read() (IPAM, error) {
	c := IPAM{Type: f.Type, QueryURL: f.QueryURL}
	if f.Type != IPAMType {
		return c, nil
	}
	if f.Subnet != "" {
		p, err := netip.ParsePrefix(f.Subnet)
		if err != nil || !p.Addr().Is4() {
			return c, fmt.Errorf("ipam.subnet %.40q is not an IPv4 CIDR such as 10.240.0.0/16", f.Subnet)
		}
		c.Subnet = p.Masked()
	}
	switch env := f.Environment; {
	case env == "" || strings.EqualFold(env, "azure"):
		c.Source = "auto"
	case strings.EqualFold(env, "mas"), strings.EqualFold(env, "fileIpam"):
		c.Source = azureStackFile
	case env == "wireserver" || env == "imds" || strings.HasPrefix(env, "/"):
		c.Source = env
	default:
		return c, fmt.Errorf("ipam.environment %.40q is none of azure, mas, fileIpam, wireserver, imds, or the path of a file", env)
	}
	if f.QueryInterval < 0 || f.QueryInterval > 86400 {
		return c, fmt.Errorf("ipam.queryInterval is a number of seconds up to a day, and not %d", f.QueryInterval)
	}
	c.Interval = time.Duration(f.QueryInterval) * time.Second
	return c, nil
}

// readAttachments reads the lists that come with GC. A runtime without
// containers sends null; one that sends neither key has not said what is valid.
func (c *Conf) readAttachments(f *file) error {
	for _, raw := range []json.RawMessage{f.Valid, f.Attached} {
		if raw == nil {
			continue
		}
		var part []types.GCAttachment
		if err := json.Unmarshal(raw, &part); err != nil {
			return fmt.Errorf("cni.dev/valid-attachments: %w", err)
		}
		c.valid, c.validSaid = append(c.valid, part...), true
	}
	return nil
}

// number is written as a number or, as in confs of 2018, as a string.
type number int

func (n *number) UnmarshalJSON(b []byte) error {
	text := strings.Trim(string(b), `"`)
	if text == "" || text == "null" {
		return nil
	}
	i, err := strconv.Atoi(text)
	if err != nil {
		return fmt.Errorf("%.40s is not a number", b)
	}
	*n = number(i)
	return nil
}

// onOff is written as true and false, or as "on" and "off".
type onOff bool

func (o *onOff) UnmarshalJSON(b []byte) error {
	switch string(b) {
	case "true", `"on"`, `"true"`:
		*o = true
	case "false", `"off"`, `"false"`, "null":
		*o = false
	default:
		return fmt.Errorf(`%.40s is neither "on" nor "off"`, b)
	}
	return nil
}

// list is written as a list of strings or, as Docker's options are, as one
// string with commas.
type list []string

func (l *list) UnmarshalJSON(b []byte) error {
	var one string
	if json.Unmarshal(b, &one) == nil {
		*l = nil
		for _, w := range words(one) {
			*l = append(*l, strings.TrimSpace(w))
		}
		return nil
	}
	return json.Unmarshal(b, (*[]string)(l))
}
