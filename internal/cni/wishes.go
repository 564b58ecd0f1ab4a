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
	"strings"
	"unicode"

	"github.com/containernetworking/cni/pkg/types"
)

// wishes is what a configuration may ask for one container, by the capability runtimeConfig or by args.cni.
type wishes struct {
	IPs json.RawMessage `json:"ips"` // a list: see the type
	MAC string          `json:"mac"`
}

// wish is an address or a MAC that one of several keys asks for.
type wish struct {
	by   string   // the key, as an error names it
	text []string // what is asked for; an interface can have one
}

// inArgs begins the name of a key that is in CNI_ARGS. All other keys are in the configuration.
const inArgs = "CNI_ARGS: "

// refuse returns an error about a wish. Its code says whether CNI_ARGS or the configuration is wrong.
func (c *Conf) refuse(w wish, format string, args ...any) error {
	text := w.by + ": " + fmt.Sprintf(format, args...)
	if strings.HasPrefix(w.by, inArgs) {
		return Errorf(types.ErrInvalidEnvironmentVariables, "%s", text)
	}
	return Errorf(types.ErrInvalidNetworkConfig, "the configuration of network %s: %s", c.Network, text)
}

// readWishes reads the address and the MAC that are asked for one container. The first of these keys counts: the
// capability runtimeConfig, args.cni, CNI_ARGS, and for an address ipam.ipAddress.
func (c *Conf) readWishes(args string, f *file) error {
	said, err := parseArgs(args)
	if err != nil {
		return Errorf(types.ErrInvalidEnvironmentVariables, inArgs+"%v", err)
	}
	addrs := []wish{{by: "runtimeConfig.ips"}, {by: "args.cni.ips"}, {inArgs + "IP", splitList(said["IP"])}, {"ipam.ipAddress", splitList(f.IPAM.IPAddress)}}
	for i, raw := range []json.RawMessage{f.RuntimeConfig.IPs, f.Args.CNI.IPs} {
		if raw == nil {
			continue
		}
		if err := json.Unmarshal(raw, (*list)(&addrs[i].text)); err != nil {
			return c.refuse(addrs[i], "it is neither a list of addresses nor one address: %.60s", raw)
		}
	}
	for _, w := range addrs {
		if len(w.text) == 0 {
			continue
		}
		if c.Addr, err = c.readAddr(w); err != nil {
			return err
		}
		c.AddrBy = w.by
		break
	}
	for _, w := range []wish{{"runtimeConfig.mac", []string{f.RuntimeConfig.MAC}}, {"args.cni.mac", []string{f.Args.CNI.MAC}}, {inArgs + "MAC", []string{said["MAC"]}}} {
		if w.text[0] == "" {
			continue
		}
		mac, err := net.ParseMAC(w.text[0])
		if err != nil || len(mac) != 6 || mac[0]&1 != 0 {
			return c.refuse(w, "the MAC asked for, %.40q, is not that of one interface, such as 02:00:00:00:00:05", w.text[0])
		}
		c.MAC = mac
		break
	}
	return nil
}

// readAddr reads the one address of a wish. Some runtimes write a prefix length after it, which is ignored.
func (c *Conf) readAddr(w wish) (netip.Addr, error) {
	if len(w.text) > 1 {
		return netip.Addr{}, c.refuse(w, "%d addresses are asked for (%.100v), and an interface has one", len(w.text), w.text)
	}
	text, _, _ := strings.Cut(w.text[0], "/")
	addr, err := netip.ParseAddr(text)
	if err != nil || !addr.Is4() {
		return netip.Addr{}, c.refuse(w, "the address asked for, %.60q, is not an IPv4 one", w.text[0])
	}
	return addr, nil
}

// parseArgs reads CNI_ARGS, which is KEY=VALUE;KEY=VALUE. If a part is wrong, it returns the other parts and an error.
func parseArgs(args string) (said map[string]string, err error) {
	said = map[string]string{}
	for pair := range strings.SplitSeq(args, ";") {
		key, value, ok := strings.Cut(pair, "=")
		if !ok && pair != "" {
			err = fmt.Errorf("%.40q is not KEY=VALUE", pair)
		}
		said[strings.TrimSpace(key)] = strings.TrimSpace(value)
	}
	return said, err
}

// podOf returns namespace/name of the pod that CNI_ARGS names. It is "" if CNI_ARGS names no pod, or has a name that no
// pod can have: such a name might break a line of the log.
func podOf(said map[string]string) string {
	const most = 63 + 1 + 253 // bytes: the longest names that Kubernetes allows
	pod := said["K8S_POD_NAMESPACE"] + "/" + said["K8S_POD_NAME"]
	odd := func(r rune) bool { return !unicode.IsPrint(r) || unicode.IsSpace(r) }
	if said["K8S_POD_NAME"] == "" || len(pod) > most || strings.ContainsFunc(pod, odd) {
		return ""
	}
	return pod
}

// splitList splits a string at its commas, and drops empty parts.
func splitList(s string) []string {
	return slices.DeleteFunc(strings.Split(s, ","), func(w string) bool { return strings.TrimSpace(w) == "" })
}

// mapping is an entry of the capability portMappings.
type mapping struct {
	HostIP        string `json:"hostIP"`
	HostPort      uint16 `json:"hostPort"`
	ContainerPort uint16 `json:"containerPort"`
	Protocol      string `json:"protocol"` // empty: tcp
}

// read reads the mapping. served is false if it is for an IPv6 address of the host: runtimes of two families send such
// mappings for every container, and containers have no IPv6 here.
func (m mapping) read() (p PortMapping, served bool, err error) {
	p = PortMapping{Proto: cmp.Or(strings.ToLower(m.Protocol), "tcp"), HostPort: m.HostPort, ContainerPort: m.ContainerPort}
	switch {
	case m.HostPort == 0 || m.ContainerPort == 0:
		return p, false, errors.New("hostPort and containerPort are from 1 to 65535")
	case p.Proto == "sctp":
		return p, false, errors.New("SCTP is not served: remove the hostPort, for containers speak SCTP at their own addresses")
	case p.Proto != "tcp" && p.Proto != "udp":
		return p, false, fmt.Errorf("protocol %.40q is not served: tcp and udp are", m.Protocol)
	case m.HostIP == "":
		return p, true, nil
	}
	addr, err := netip.ParseAddr(m.HostIP)
	if err != nil {
		return p, false, fmt.Errorf("hostIP %.80q is not an address", m.HostIP)
	}
	p.HostAddr = addr.Unmap()
	return p, p.HostAddr.Is4(), nil
}
