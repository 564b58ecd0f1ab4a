// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
)

// Seen says that a server sees from as want.
func Seen(t *testing.T, from Place, to, want netip.Addr) {
	t.Helper()
	if got, err := from.Try(Fetch(fmt.Sprintf("http://%s/cgi-bin/who", to))...); err != nil || got != want.String() {
		t.Errorf("%s fetches from %s and is seen as %q, want %s: %v", from.Name, to, got, want, err)
	}
}

// FromOutside fetches from one of the addresses on the internet's side: whom does
// a server see?
func FromOutside(vnet *vnetsim.VNet, from, to netip.Addr, port uint16) (string, error) {
	dialer := net.Dialer{Timeout: 5 * time.Second, LocalAddr: &net.TCPAddr{IP: from.AsSlice()}}
	var got []byte
	err := vnet.Internet.Do(func() error {
		conn, err := dialer.Dial("tcp4", netip.AddrPortFrom(to, port).String())
		if err != nil {
			return err
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		fmt.Fprint(conn, "GET /cgi-bin/who HTTP/1.0\r\n\r\n")
		got, err = io.ReadAll(conn)
		return err
	})
	text := strings.TrimSpace(string(got))
	return text[strings.LastIndex(text, "\n")+1:], err
}

// Probed says that a load balancer's probe is answered by the container itself:
// the fabric refuses an answer from a NIC that has not the container's address.
func Probed(t *testing.T, vnet *vnetsim.VNet, to netip.Addr) {
	t.Helper()
	if got, err := FromOutside(vnet, vnetsim.HostAgentAddr, to, 80); got != vnetsim.HostAgentAddr.String() {
		t.Errorf("the probe of %s is answered with %q: %v", to, got, err)
	}
}

// Server answers HTTP on port 80 with the client's address.
const Server = `mkdir -p /www/cgi-bin
printf '#!/bin/sh\necho; echo $REMOTE_ADDR\n' >/www/cgi-bin/who
chmod +x /www/cgi-bin/who
exec httpd -f -p 0.0.0.0:80 -h /www`

// Place is somewhere that pings and fetches can be sent from.
type Place struct {
	Name   string
	Addr   netip.Addr
	Prefix []string // begins a command that runs there
	Host   Host

	container string // of the VM's engine, empty elsewhere
}

// Try runs a command there.
func (p Place) Try(arg ...string) (string, error) {
	all := append(slices.Clone(p.Prefix), arg...)
	if p.container != "" {
		c, err := p.Host.inspect(p.container)
		if err != nil {
			return "", err
		}
		all = append([]string{"nsenter", "-t", strconv.Itoa(c.State.Pid), "-m", "-n", "-u", "-i", "-p"}, all...)
	}
	return p.Host.Try(all[0], all[1:]...)
}

// OnHost is the VM itself.
func OnHost(h Host) Place {
	return Place{Name: h.Name, Addr: h.Primary, Prefix: []string{"busybox"}, Host: h}
}

// InContainer is a Docker container. Commands enter its namespaces: docker exec takes twenty times the CPU time.
func InContainer(h Host, name string, addr netip.Addr) Place {
	return Place{Name: name, Addr: addr, Host: h, container: name}
}

// Fetch prints what an HTTP server answers. A server that has just been started may not listen yet, so it asks for two
// seconds. timeout bounds wget from outside: with -T Debian's static one crashes.
func Fetch(url string) []string {
	const ask = `for i in 1 2 3 4 5 6 7 8 9; do busybox wget -q -O - "$0" && exit; busybox sleep 0.2; done; exit 1`
	return []string{"timeout", "5", "busybox", "sh", "-c", ask, url}
}
