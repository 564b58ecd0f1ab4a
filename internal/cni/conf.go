// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
)

// IPAMType is the ipam.type, and the name of the binary, of azure-vnet's own IPAM plugin.
const IPAMType = "azure-vnet-ipam"

// azureStackFile lists the addresses of a node of Azure Stack.
const azureStackFile = "/etc/kubernetes/interfaces.json"

// oldestVersion is the CNI version of a configuration that names none.
const oldestVersion = "0.1.0"

// The modes of a network, as the configuration spells them.
const (
	ModeBridge      = "bridge"      // the default: the host end of a container is a port of the NIC's bridge
	ModeTransparent = "transparent" // the host end stands alone
)

// Conf is a network's configuration, with what the runtime adds for one container. Runtimes add keys of their own, so
// unknown keys are ignored.
type Conf struct {
	CNIVersion string // 0.1.0 if the configuration names none
	Network    string // the network's name

	// Keys of the main plugin.
	Master     string           // the NIC, by name or MAC; empty: the first NIC that has the subnet or, with another IPAM, the one of the default route
	Mode       string           // ModeBridge or ModeTransparent; empty: ModeBridge
	Bridge     string           // name of the NIC's bridge; empty: the bridge has its default name, or the mode is transparent
	MTU        int              // bytes, of the container's interface; 0: the NIC's
	SNAT       bool             // what goes to no direct destination leaves with the address of the link that it leaves by
	Direct     []netip.Prefix   // reached without SNAT; nil: the key is missing
	NoMetadata bool             // containers do not reach 169.254.169.254
	MAC        net.HardwareAddr // of the container's interface; nil: derived from its address
	Ports      []PortMapping    // published ports
	DNS        types.DNS

	IPAM    IPAM
	Reclaim bool       // if no other address is left, those that the host's NIC holds are taken off it
	Addr    netip.Addr // the address that is asked for; zero: any
	AddrBy  string     // the key that asks for Addr, as an error names it

	prev       json.RawMessage      // prevResult
	valid      []types.GCAttachment // the attachments that GC keeps
	listsValid bool                 // the configuration has such a list, which may be empty
}

// PortMapping is a port of the host that leads to a port of the container.
type PortMapping struct {
	Proto         string     // tcp or udp
	HostAddr      netip.Addr // IPv4 address of the host; zero: any
	HostPort      uint16
	ContainerPort uint16
}

// IPAM says where the address comes from. If Type is not IPAMType, the other fields are empty.
type IPAM struct {
	Type     string
	Subnet   netip.Prefix  // zero: the NIC's first
	Source   string        // as in pool.Config
	QueryURL string        // empty: the source's own
	Interval time.Duration // between questions to the source; 0: the pool's default
}

// file is the configuration as it is written, without the keys that only a main plugin has.
type file struct {
	CNIVersion string
	Name       string
	Reclaim    onOff
	LogLevel   string
	LogTarget  string
	IPAM       fileIPAM        `json:"-"` // RawIPAM, if its type is IPAMType
	RawIPAM    json.RawMessage `json:"ipam"`

	Args struct {
		CNI wishes `json:"cni"`
	} `json:"args"`
	RuntimeConfig wishes `json:"runtimeConfig"`
	PrevResult    json.RawMessage
	Valid         json.RawMessage `json:"cni.dev/valid-attachments"`
	Attached      json.RawMessage `json:"cni.dev/attachments"`
}

// fileMain has the keys of azure-vnet. They are read only for azure-vnet: the configuration of another main plugin may
// have the same keys with values of another kind.
type fileMain struct {
	Mode     string `json:"mode"`
	Bridge   string `json:"bridge"`
	Master   string `json:"master"`
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

// readName reads the CNI version, the network's name and ipam.type. DEL and an error document need no more. A key that
// cannot be read is left empty.
func readName(stdin []byte) Conf {
	var f struct {
		CNIVersion string
		Name       string
		IPAM       json.RawMessage
	}
	if json.Unmarshal(stdin, &f) == nil { // otherwise skel says what is wrong
		f.CNIVersion = cmp.Or(f.CNIVersion, oldestVersion)
	}
	return Conf{CNIVersion: f.CNIVersion, Network: f.Name, IPAM: IPAM{Type: ipamType(f.IPAM)}}
}

// ipamType returns ipam.type. It is "" if the configuration has none.
func ipamType(raw json.RawMessage) string {
	var ipam struct{ Type string }
	_ = json.Unmarshal(raw, &ipam)
	return ipam.Type
}

// readConf reads the whole configuration of a call of plugin p. args is CNI_ARGS.
func readConf(stdin []byte, args string, p Plugin) (Conf, error) {
	var f file
	if err := json.Unmarshal(stdin, &f); err != nil {
		return readName(stdin), Errorf(types.ErrInvalidNetworkConfig, "the network configuration: %v", wordKind(err))
	}
	c := Conf{CNIVersion: cmp.Or(f.CNIVersion, oldestVersion), Network: f.Name, Reclaim: bool(f.Reclaim), prev: f.PrevResult}
	f.IPAM.Type = ipamType(f.RawIPAM)
	err := f.checkLogKeys()
	if err == nil && f.IPAM.Type == IPAMType { // another IPAM plugin reads its own keys
		if err = json.Unmarshal(f.RawIPAM, &f.IPAM); err != nil {
			err = fmt.Errorf("ipam: %w", wordKind(err))
		}
	}
	if err == nil && p.Main {
		err = c.readMain(stdin, f.IPAM.Type, p.CheckNames)
	}
	if err == nil {
		c.IPAM, err = f.IPAM.read()
	}
	if err == nil {
		err = c.readAttachments(&f)
	}
	if err != nil {
		return c, Errorf(types.ErrInvalidNetworkConfig, "the configuration of network %s: %v", f.Name, err)
	}
	return c, c.readWishes(args, &f)
}

// wordKind words an error about a value of the wrong kind, such as a string in the place of a number. It names the key
// as the configuration spells it. It returns any other error as it is.
func wordKind(err error) error {
	var bad *json.UnmarshalTypeError
	if errors.As(err, &bad) && bad.Field != "" {
		return fmt.Errorf("%s is a %s, which it cannot be", bad.Field, bad.Value)
	}
	return err
}

// readMain reads the keys of the main plugin. ipam is ipam.type.
func (c *Conf) readMain(stdin []byte, ipam string, checkNames func(Conf) error) error {
	var f fileMain
	if err := json.Unmarshal(stdin, &f); err != nil {
		return wordKind(err)
	}
	if f.Mode != "" && f.Mode != ModeBridge && f.Mode != ModeTransparent {
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
	c.Master, c.Mode, c.Bridge, c.MTU = f.Master, f.Mode, f.Bridge, int(f.MTU)
	if checkNames != nil {
		if err := checkNames(*c); err != nil {
			return err
		}
	}
	if c.Mode == ModeTransparent {
		c.Bridge = "" // the shipped configuration names a bridge, and people change only its mode
	}
	c.SNAT, c.NoMetadata = f.SNAT == nil || bool(*f.SNAT), f.Metadata != nil && !bool(*f.Metadata)
	for _, text := range f.Direct {
		prefix, ok := parsePrefix(text)
		if !ok {
			return fmt.Errorf("direct has %.40q, which is not an IPv4 CIDR such as 10.0.0.0/8", text)
		}
		c.Direct = append(c.Direct, prefix)
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
		p, served, err := m.read()
		if err != nil {
			return fmt.Errorf("runtimeConfig.portMappings: port %d of the container: %w", m.ContainerPort, err)
		}
		if served {
			c.Ports = append(c.Ports, p)
		}
	}
	return nil
}

// parsePrefix reads an IPv4 prefix, and clears its host bits.
func parsePrefix(text string) (prefix netip.Prefix, ok bool) {
	p, err := netip.ParsePrefix(text)
	return p.Masked(), err == nil && p.Addr().Is4()
}

// read reads the keys of azure-vnet's own IPAM plugin. Of another plugin it reads only the type.
func (f fileIPAM) read() (IPAM, error) {
	c := IPAM{Type: f.Type, QueryURL: f.QueryURL}
	if f.Type != IPAMType {
		return c, nil
	}
	if f.Subnet != "" {
		prefix, ok := parsePrefix(f.Subnet)
		if !ok {
			return c, fmt.Errorf("ipam.subnet %.40q is not an IPv4 CIDR such as 10.240.0.0/16", f.Subnet)
		}
		c.Subnet = prefix
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

// readAttachments reads the lists that come with GC. A runtime without containers sends null, which is an empty list. A
// configuration with neither key has no list: see Stale.
func (c *Conf) readAttachments(f *file) error {
	for _, raw := range []json.RawMessage{f.Valid, f.Attached} {
		if raw == nil {
			continue
		}
		var part []types.GCAttachment
		if err := json.Unmarshal(raw, &part); err != nil {
			return fmt.Errorf("cni.dev/valid-attachments: %w", err)
		}
		c.valid, c.listsValid = append(c.valid, part...), true
	}
	return nil
}

// number is an integer in the configuration. Configurations of 2018 wrote numbers as strings, so both are read.
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

// onOff is a switch in the configuration: true or "on", false or "off".
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

// list is a list of strings in the configuration. It may also be one string with commas, as Docker's options are.
type list []string

func (l *list) UnmarshalJSON(b []byte) error {
	var one string
	if json.Unmarshal(b, &one) == nil {
		*l = nil
		for _, w := range splitList(one) {
			*l = append(*l, strings.TrimSpace(w))
		}
		return nil
	}
	return json.Unmarshal(b, (*[]string)(l))
}
