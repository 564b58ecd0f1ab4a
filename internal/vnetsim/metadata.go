// Copyright (c) The azure-vnet authors. MIT licence.

package vnetsim

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// serve starts the servers of the internet's side. Their sockets lie in the
// internet's namespace and their handlers in this process.
func (v *VNet) serve() error {
	handlers := map[netip.Addr]http.HandlerFunc{
		HostAgentAddr: v.hostAgent,
		IMDSAddr:      v.imds,
		InternetAddr:  whoAmI,
	}
	for addr, handler := range handlers {
		var l net.Listener
		err := v.Internet.Do(func() (err error) {
			l, err = net.Listen("tcp4", netip.AddrPortFrom(addr, 80).String())
			return err
		})
		if err != nil {
			return err
		}
		server := &http.Server{Handler: handler}
		v.servers = append(v.servers, func() { server.Close() })
		go server.Serve(l)
	}
	var dns net.PacketConn
	err := v.Internet.Do(func() (err error) {
		dns, err = net.ListenPacket("udp4", netip.AddrPortFrom(HostAgentAddr, 53).String())
		return err
	})
	if err != nil {
		return err
	}
	v.servers = append(v.servers, func() { dns.Close() })
	go serveDNS(dns)
	return nil
}

// whoAmI answers with the address that the internet sees.
func whoAmI(w http.ResponseWriter, r *http.Request) {
	fmt.Fprintln(w, client(r))
}

func client(r *http.Request) netip.Addr {
	ap, _ := netip.ParseAddrPort(r.RemoteAddr) // net/http wrote it
	return ap.Addr().Unmap()
}

// ask finds the VM that asks a source, by its primary address, its NICs as the
// source sees them, and the source's fault. ok is false for everyone else.
func (v *VNet) ask(s Source, r *http.Request) (vm *VM, nics []NIC, f Fault, ok bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	i := slices.IndexFunc(v.vms, func(vm *VM) bool {
		return vm.Primary == client(r) || s == IMDS && slices.ContainsFunc(vm.nics, func(n *nic) bool { return n.Primary == client(r) })
	})
	if i < 0 {
		return nil, nil, "", false
	}
	vm = v.vms[i]
	f = vm.faults[s]
	for _, n := range vm.nics {
		known := n.NIC
		if f == Stale && len(known.Secondaries) > 0 {
			known.Secondaries = known.Secondaries[:len(known.Secondaries)-1]
		}
		nics = append(nics, known)
	}
	return vm, nics, f, true
}

// hostAgent is the WireServer's nmagent, as far as it tells addresses.
func (v *VNet) hostAgent(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	_, nics, fault, ok := v.ask(HostAgent, r)
	switch {
	case !ok:
		http.Error(w, "Forbidden", http.StatusForbidden)
	case r.URL.Path != "/machine/plugins" && r.URL.Path != "/machine/plugins/",
		q.Get("comp") != "nmagent", q.Get("type") != "getinterfaceinfov1":
		http.NotFound(w, r)
	case r.Method != http.MethodGet:
		http.Error(w, "Method Not Allowed", http.StatusMethodNotAllowed)
	default:
		answer(w, fault, "text/xml; charset=utf-8", interfacesXML(nics), "<Interfaces/>")
	}
}

func interfacesXML(nics []NIC) string {
	var b strings.Builder
	b.WriteString("<Interfaces>\n")
	for i, n := range nics {
		fmt.Fprintf(&b, "    <Interface MacAddress=%q IsPrimary=\"%t\">\n", bareMAC(n.MAC), i == 0)
		fmt.Fprintf(&b, "        <IPSubnet Prefix=%q>\n", n.Prefix.String())
		for _, a := range n.addresses() {
			fmt.Fprintf(&b, "            <IPAddress Address=%q IsPrimary=\"%t\"/>\n", a.String(), a == n.Primary)
		}
		b.WriteString("        </IPSubnet>\n    </Interface>\n")
	}
	b.WriteString("</Interfaces>\n")
	return b.String()
}

// bareMAC writes a MAC as Azure's documents do.
func bareMAC(mac string) string { return strings.ToUpper(strings.ReplaceAll(mac, ":", "")) }

// imdsVersions are those of IMDS that are answered.
var imdsVersions = []string{"2017-08-01", "2019-06-01", "2021-02-01"}

// imds is the Instance Metadata Service, as far as it tells addresses.
func (v *VNet) imds(w http.ResponseWriter, r *http.Request) {
	vm, nics, fault, ok := v.ask(IMDS, r)
	switch path := strings.TrimSuffix(r.URL.Path, "/"); {
	case !ok:
		imdsError(w, http.StatusForbidden, "Forbidden")
	case r.Header.Get("Metadata") != "true":
		imdsError(w, http.StatusBadRequest, "Bad request. Required metadata header not specified")
	case r.Header.Get("X-Forwarded-For") != "":
		imdsError(w, http.StatusBadRequest, "Bad request. X-Forwarded-For header is not allowed")
	case path != "/metadata/instance/network":
		imdsError(w, http.StatusNotFound, "Not found")
	case !slices.Contains(imdsVersions, r.URL.Query().Get("api-version")):
		imdsError(w, http.StatusBadRequest, "Bad request. api-version is invalid or was not specified in the request.")
	default:
		answer(w, fault, "application/json; charset=utf-8", networkJSON(vm.Public, nics), `{"interface":[]}`)
	}
}

func imdsError(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(map[string]any{"error": text, "newest-versions": imdsVersions})
}

// networkJSON is IMDS's document for a VM with the public address: all values
// are strings, and nothing says which NIC or address is the primary.
func networkJSON(public netip.Addr, nics []NIC) string {
	type address struct {
		Private string `json:"privateIpAddress"`
		Public  string `json:"publicIpAddress"`
	}
	type subnet struct {
		Address string `json:"address"`
		Prefix  string `json:"prefix"`
	}
	type family struct {
		Addresses []address `json:"ipAddress"`
		Subnets   []subnet  `json:"subnet,omitempty"`
	}
	type iface struct {
		IPv4 family `json:"ipv4"`
		IPv6 family `json:"ipv6"`
		MAC  string `json:"macAddress"`
	}
	interfaces := []iface{}
	for i, n := range nics {
		f := iface{IPv6: family{Addresses: []address{}}, MAC: bareMAC(n.MAC)}
		for _, a := range n.addresses() {
			f.IPv4.Addresses = append(f.IPv4.Addresses, address{Private: a.String()})
		}
		if i == 0 {
			f.IPv4.Addresses[0].Public = public.String()
		}
		f.IPv4.Subnets = []subnet{{n.Prefix.Addr().String(), strconv.Itoa(n.Prefix.Bits())}}
		interfaces = append(interfaces, f)
	}
	b, _ := json.Marshal(map[string]any{"interface": interfaces}) // strings cannot fail
	return string(b)
}
