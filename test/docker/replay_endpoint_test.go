// Copyright (c) The azure-vnet authors. MIT licence.

package docker

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// endpoint is what the engine knows of one.
type endpoint struct {
	id, step   string
	addr       netip.Addr
	mac        string
	ports      []publishedPort // that came with CreateEndpoint
	internal   bool            // of an internal network
	link       string          // the container's end, as Join named it
	hostEnd    string          // the end that stays on the host
	gateway    netip.Addr      // invalid: none
	in         *test.Container // nil: not in a container
	name       string          // of the link in the sandbox
	programmed bool            // the container's default route is by this endpoint
	gone       bool            // the engine removed it
}

// publishedPort is one of com.docker.network.portmap.
type publishedPort struct {
	Proto                       uint8
	Port, HostPort, HostPortEnd uint16
	HostIP                      string
}

// reached says that an endpoint and everybody it may speak with reach each other.
func (r *engineReplay) reached(ep *endpoint) {
	r.T.Helper()
	if ep.in == nil {
		return
	}
	near := []netip.Addr{r.Primary}
	if r.witness != nil && r.witness != ep {
		near = append(near, r.witness.addr)
	}
	far := []netip.Addr{r.other.Primary}
	if ep.internal {
		ep.in.Reaches(r.T, ep.id, near...)
		if silent, err := test.Ping(ep.in.Ns, test.SilenceTime, far...); err != nil || len(silent) != len(far) {
			r.T.Errorf("of an internal network %s reaches others than %v: %v", ep.addr, silent, err)
		}
		return
	}
	if ep.programmed {
		far = append(far, vnetsim.InternetAddr)
	}
	ep.in.Reaches(r.T, ep.id, append(near, far...)...)
	if silent, err := test.Ping(r.beyond, test.PingTime, ep.addr); err != nil || len(silent) > 0 {
		r.T.Errorf("%s does not reach %s: %v", r.other.Name, ep.addr, err)
	}
	if ep.programmed {
		r.portsReached(ep)
	}
}

// toldPort is one of the TCP ports that EndpointOperInfo tells, on every address.
var toldPort = regexp.MustCompile(`0\.0\.0\.0:(\d+)->(\d+)/tcp`)

// toldPortsReached says that the ports that the plugin tells lead to the endpoint: so
// those that it chose itself do too.
func (r *engineReplay) toldPortsReached(ep *endpoint, text string) {
	r.T.Helper()
	for _, told := range toldPort.FindAllStringSubmatch(text, -1) {
		outer, errOuter := strconv.ParseUint(told[1], 10, 16)
		inner, errInner := strconv.ParseUint(told[2], 10, 16)
		if err := errors.Join(errOuter, errInner); err != nil {
			r.T.Fatal(err)
		}
		r.portReached(ep, r.beyond, netip.AddrPortFrom(r.Primary, uint16(outer)), uint16(inner))
	}
}

// portReached says that a port of the host leads to one of the endpoint.
func (r *engineReplay) portReached(ep *endpoint, from netns.NsHandle, outer netip.AddrPort, inner uint16) {
	r.T.Helper()
	if err := ep.in.Listen(inner); err != nil {
		r.T.Fatal(err)
	}
	if said, err := test.Greeting(from, outer); err != nil {
		r.T.Errorf("%s, which leads to port %d of %s: %q, %v", outer, inner, ep.addr, said, err)
	}
}

// portsReached says that the ports that came with CreateEndpoint lead to the endpoint.
// It leaves out UDP, and the ports of the host that the plugin chooses.
func (r *engineReplay) portsReached(ep *endpoint) {
	r.T.Helper()
	for _, p := range ep.ports {
		if p.Proto != 6 || p.HostPort == 0 || p.HostPortEnd > p.HostPort {
			continue
		}
		if p.HostIP != "" {
			r.portReached(ep, r.vm, netip.AddrPortFrom(netip.MustParseAddr(p.HostIP), p.HostPort), p.Port)
		} else {
			r.portReached(ep, r.beyond, netip.AddrPortFrom(r.Primary, p.HostPort), p.Port)
		}
	}
}

// joined does what an engine does with Join's answer: it moves the link into the
// container's namespace, and gives it its address and the routes.
func (r *engineReplay) joined(ep *endpoint, key string, answer map[string]any) {
	r.T.Helper()
	must := func(err error) {
		r.T.Helper()
		if err != nil {
			r.T.Fatalf("move the link of %v into a container: %v", answer, err)
		}
	}
	var join struct {
		InterfaceName struct{ SrcName, DstPrefix string }
		Gateway       string
		StaticRoutes  []struct {
			Destination, NextHop string
			RouteType            int // 0: NextHop leads there; 1: the link does
		}
	}
	text, err := json.Marshal(answer)
	must(err)
	must(json.Unmarshal(text, &join))
	if box := r.sandboxes[key]; box == nil || !box.Ns.IsOpen() {
		box, err = test.NewContainer()
		must(err)
		r.sandboxes[key] = box
		r.made = append(r.made, box)
	}
	ep.in, ep.link = r.sandboxes[key], join.InterfaceName.SrcName
	ep.gateway, _ = netip.ParseAddr(join.Gateway)

	outside, err := netlink.NewHandleAt(r.vm)
	must(err)
	defer outside.Close()
	link, err := outside.LinkByName(ep.link)
	must(err)
	hostEnd, err := outside.LinkByIndex(link.Attrs().ParentIndex)
	must(err)
	ep.hostEnd = hostEnd.Attrs().Name
	must(outside.LinkSetNsFd(link, int(ep.in.Ns)))

	inside, err := netlink.NewHandleAt(ep.in.Ns)
	must(err)
	defer inside.Close()
	link, err = inside.LinkByName(ep.link)
	must(err)
	if mac := link.Attrs().HardwareAddr.String(); mac != ep.mac {
		r.T.Errorf("the link of %s has the MAC %s", ep.mac, mac)
	}
	for n := 0; ; n++ {
		ep.name = fmt.Sprint(join.InterfaceName.DstPrefix, n)
		if _, err := inside.LinkByName(ep.name); err != nil {
			break
		}
	}
	must(inside.LinkSetName(link, ep.name))
	addr, err := netlink.ParseAddr(netip.PrefixFrom(ep.addr, r.Prefix.Bits()).String())
	must(err)
	must(inside.AddrAdd(link, addr))
	must(inside.LinkSetUp(link))
	for _, s := range join.StaticRoutes {
		_, dst, err := net.ParseCIDR(s.Destination)
		must(err)
		route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: dst, Scope: netlink.SCOPE_LINK}
		if s.RouteType == 0 {
			route.Gw, route.Scope = net.ParseIP(s.NextHop), netlink.SCOPE_UNIVERSE
		}
		must(inside.RouteAdd(route))
	}
	// A frame that is sent before the bridge knows that the port has a carrier is lost,
	// and ARP asks again after a second. Engines from 28 wait too.
	test.Eventually(r.T, "the link of "+ep.addr.String()+" is up at both ends", 5*time.Second, func() bool {
		in, errIn := inside.LinkByName(ep.name)
		out, errOut := outside.LinkByName(ep.hostEnd)
		return errIn == nil && errOut == nil && in.Attrs().OperState == netlink.OperUp && out.Attrs().OperState == netlink.OperUp
	})
	r.reached(ep)
}

// defaultRoute adds or removes the container's route by an endpoint's gateway.
func (r *engineReplay) defaultRoute(ep *endpoint, change func(*netlink.Handle, *netlink.Route) error) {
	r.T.Helper()
	inside, err := netlink.NewHandleAt(ep.in.Ns)
	if err != nil {
		r.T.Fatal(err)
	}
	defer inside.Close()
	link, err := inside.LinkByName(ep.name)
	if err == nil {
		err = change(inside, &netlink.Route{LinkIndex: link.Attrs().Index, Gw: ep.gateway.AsSlice()})
	}
	if err != nil {
		r.T.Errorf("the default route of %s: %v", ep.addr, err)
	}
}

// programmed gives the container its default route: an engine tells
// ProgramExternalConnectivity of exactly the endpoint whose network is the gateway.
func (r *engineReplay) programmed(ep *endpoint, request map[string]any) {
	r.T.Helper()
	if ep == nil || ep.in == nil || ep.programmed || ep.gone {
		return
	}
	if !ep.gateway.IsValid() {
		r.T.Errorf("an engine programs %s, and Join gave no gateway", ep.addr)
		return
	}
	r.defaultRoute(ep, (*netlink.Handle).RouteAdd)
	ep.programmed, ep.ports = true, r.portMap(request)
	r.reached(ep)
}

// revoke takes the default route away, before the plugin is told.
func (r *engineReplay) revoke(ep *endpoint) {
	r.T.Helper()
	if ep == nil || !ep.programmed {
		return
	}
	if ep.in != nil {
		r.defaultRoute(ep, (*netlink.Handle).RouteDel)
	}
	ep.programmed = false
}

// left brings the link back to the host, as an engine does after Leave. A link that
// died with its namespace does not come back.
func (r *engineReplay) left(ep *endpoint) {
	r.T.Helper()
	if ep == nil || ep.in == nil {
		return
	}
	inside, err := netlink.NewHandleAt(ep.in.Ns)
	if err != nil {
		r.T.Fatal(err)
	}
	defer inside.Close()
	link, err := inside.LinkByName(ep.name)
	if err == nil {
		err = inside.LinkSetDown(link)
	}
	if err == nil {
		err = inside.LinkSetName(link, ep.link)
	}
	if err == nil {
		err = inside.LinkSetNsFd(link, int(r.vm))
	}
	if err != nil {
		r.T.Errorf("bring %s back from the container: %v", ep.link, err)
	}
	box := ep.in
	ep.in, ep.programmed = nil, false
	if !slices.ContainsFunc(r.lives(), func(e *endpoint) bool { return e.in == box }) {
		box.Close()
	}
}
