// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"azurevnet/internal/vnetsim"
)

// How long each path is measured, a round.
const pathTime, slicesOfPath = 500 * time.Millisecond, 20

const echoPort = "7007"

// publishedPort leads to the echo server of the pod "pub".
const publishedPort = "7008"

// path is a way from a client to a server.
type path struct {
	name   string
	from   *vnetsim.VM
	client string         // network namespace on it; empty: the VM itself
	server netip.AddrPort // echoes
	call   string         // of bridge-nf-call-iptables on the VMs of azure-vnet, meanwhile

	turn, rate []float64 // µs of a datagram's round trip; Gbit/s of one TCP connection

	bare *path // the same path before azure-vnet is on the VMs; nil: it is not measured
}

// pinned keeps both ends of a path on one CPU, so that a figure is what the kernels do for a packet. Else most of it
// would be how long an idle CPU takes to wake up.
var pinned = []string{"taskset", "--cpu-list", "0"}

// asAnEngine gives a VM the rules of Docker's engine 20.10 without a container, and has it forward. The kernel then
// tracks its connections and asks the nat hooks for each of its packets. All that costs the VM's own packets something,
// and it is there before azure-vnet is. kube-proxy's rules cost more. The engine's policy of FORWARD, DROP, is left out: the
// reference plugin would reach nothing.
const asAnEngine = `echo 1 >/proc/sys/net/ipv4/ip_forward
iptables -t nat -N DOCKER
iptables -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
iptables -t nat -A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
iptables -t nat -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
iptables -t nat -A DOCKER -i docker0 -j RETURN
iptables -N DOCKER
iptables -N DOCKER-ISOLATION-STAGE-1
iptables -N DOCKER-ISOLATION-STAGE-2
iptables -N DOCKER-USER
iptables -A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
iptables -A DOCKER-ISOLATION-STAGE-1 -j RETURN
iptables -A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
iptables -A DOCKER-ISOLATION-STAGE-2 -j RETURN
iptables -A DOCKER-USER -j RETURN
iptables -A FORWARD -j DOCKER-USER
iptables -A FORWARD -j DOCKER-ISOLATION-STAGE-1
iptables -A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
iptables -A FORWARD -o docker0 -j DOCKER
iptables -A FORWARD -i docker0 ! -o docker0 -j ACCEPT
iptables -A FORWARD -i docker0 -o docker0 -j ACCEPT`

// paths measures what the wire costs a packet, each path in turn: between VMs without azure-vnet, of which those that
// could run containers are the floor, and between VMs with it.
func paths(dir, self string, rounds, standing int) error {
	vnet, err := vnetsim.New(vnetsim.Config{})
	if err != nil {
		return err
	}
	defer vnet.Close()
	var vms []*vnetsim.VM
	for range 8 {
		vm, err := vnet.AddVM(vnetsim.VMConfig{Secondaries: standing + 8})
		if err != nil {
			return err
		}
		vms = append(vms, vm)
	}
	plain, engine, bridged, routed := vms[:2], vms[2:4], vms[4:6], vms[6:]
	at := func(vm *vnetsim.VM, port string) netip.AddrPort {
		return netip.MustParseAddrPort(vm.Primary.String() + ":" + port)
	}
	bare, err := hostPaths(engine, bridged, routed, self, rounds, at)
	if err != nil {
		return err
	}
	if err := addPods(vms[4:], dir, self, standing); err != nil {
		return err
	}
	stop, err := startEchoes([]echoAt{{plain[1], ""}, {engine[1], ""}, {bridged[1], ""}, {bridged[1], "c0"}, {bridged[1], "pub"}, {bridged[0], "c1"},
		{routed[1], ""}, {routed[1], "c0"}, {routed[1], "pub"}, {routed[0], "c1"}}, self)
	defer stop()
	if err != nil {
		return err
	}
	pod := func(vm *vnetsim.VM, name string) netip.AddrPort {
		return netip.MustParseAddrPort(vm.Secondaries()[slices.Index(podNames, name)].String() + ":" + echoPort)
	}
	all := []*path{
		{name: "VMs as an engine has them: the floor", from: engine[0], server: at(engine[1], echoPort), bare: bare[0]},
		{name: "plain VMs, as they come", from: plain[0], server: at(plain[1], echoPort)},
		{name: "host to host, beside bridge containers", from: bridged[0], server: at(bridged[1], echoPort), bare: bare[1]},
		{name: "host to host, beside transparent ones", from: routed[0], server: at(routed[1], echoPort), bare: bare[2]},
		{name: "container to container, bridge", from: bridged[0], client: "c0", server: pod(bridged[1], "c0"), call: "0"},
		{name: "the same, call-iptables 1", from: bridged[0], client: "c0", server: pod(bridged[1], "c0"), call: "1"},
		{name: "container to container, transparent", from: routed[0], client: "c0", server: pod(routed[1], "c0"), call: "0"},
		{name: "on one VM, bridge", from: bridged[0], client: "c0", server: pod(bridged[0], "c1"), call: "0"},
		{name: "on one VM, transparent", from: routed[0], client: "c0", server: pod(routed[0], "c1"), call: "0"},
		{name: "plain VM to a published port, bridge", from: plain[0], server: at(bridged[1], publishedPort), call: "0"},
		{name: "plain VM to a published port, transparent", from: plain[0], server: at(routed[1], publishedPort), call: "0"},
		{name: "reference bridge, masqueraded", from: bridged[0], client: "masq", server: at(plain[1], echoPort), call: "0"},
	}
	for range rounds {
		for _, p := range all {
			if err := p.measure(self, vms[4:]); err != nil {
				return fmt.Errorf("%s: %w", p.name, err)
			}
		}
	}
	printPaths(all, rounds, standing)
	return nil
}

// hostPaths makes all these VMs as an engine has them, and measures from host to host before azure-vnet is there. Two pairs
// of VMs of the same kind differ by some percent, which is more than azure-vnet adds.
func hostPaths(engine, bridged, routed []*vnetsim.VM, self string, rounds int, at func(*vnetsim.VM, string) netip.AddrPort) (bare []*path, err error) {
	for _, vm := range slices.Concat(engine, bridged, routed) {
		if out, err := vm.Run(context.Background(), "sh", "-ec", asAnEngine); err != nil {
			return nil, fmt.Errorf("%w: %s", err, out)
		}
	}
	stop, err := startEchoes([]echoAt{{engine[1], ""}, {bridged[1], ""}, {routed[1], ""}}, self)
	defer stop()
	if err != nil {
		return nil, err
	}
	for _, pair := range [][]*vnetsim.VM{engine, bridged, routed} {
		bare = append(bare, &path{name: pair[0].Name, from: pair[0], server: at(pair[1], echoPort)})
	}
	for range rounds {
		for _, p := range bare {
			if err := p.measure(self, nil); err != nil {
				return nil, fmt.Errorf("%s before azure-vnet: %w", p.name, err)
			}
		}
	}
	return bare, nil
}

func printPaths(all []*path, rounds, standing int) {
	fmt.Printf("\n%-43s %9s %15s %7s %11s %7s   (medians and quartiles of %d rounds; ratios to the floor, round by round; %d other containers a VM)\n",
		"path", "UDP µs", "quartiles", "ratio", "TCP Gbit/s", "ratio", rounds, standing)
	for _, p := range all {
		turns := slices.Sorted(slices.Values(p.turn))
		fmt.Printf("%-43s %9.1f %7.1f %7.1f %7.2f %11.2f %7.2f\n", p.name, median(p.turn), turns[len(turns)/4], turns[len(turns)*3/4],
			median(over(p.turn, all[0].turn)), median(p.rate), median(over(p.rate, all[0].rate)))
	}
	fmt.Println("\nfrom host to host, what azure-vnet changes on the same VMs, by the change of the floor meanwhile:")
	for _, p := range all[1:] {
		if p.bare != nil {
			floor := all[0]
			fmt.Printf("%-43s UDP %.3f, TCP %.3f\n", p.name, median(p.turn)/median(p.bare.turn)/(median(floor.turn)/median(floor.bare.turn)),
				median(p.rate)/median(p.bare.rate)/(median(floor.rate)/median(floor.bare.rate)))
		}
	}
}

// addPods makes pods on our VMs: two of bridge mode, and two of transparent mode.
func addPods(ours []*vnetsim.VM, dir, self string, standing int) error {
	for i, vm := range ours {
		mode := []string{"bridge", "bridge", "transparent", "transparent"}[i]
		pods := vm.Command(context.Background(), self, "-inside", dir, "-pods", strconv.Itoa(standing), "-mode", mode)
		if out, err := pods.CombinedOutput(); err != nil {
			return fmt.Errorf("pods on %s: %w: %s", vm.Name, err, out)
		}
	}
	return nil
}

// echoAt is where an echo server runs: in a pod of a VM; empty: on the VM itself.
type echoAt struct {
	vm  *vnetsim.VM
	pod string
}

// startEchoes starts the servers. stop ends those that were started, after an error too.
func startEchoes(all []echoAt, self string) (stop func(), err error) {
	var started []*exec.Cmd
	stop = func() {
		for _, server := range started {
			_ = server.Process.Kill()
			_ = server.Wait()
		}
	}
	for _, at := range all {
		line := append(enter(at.pod), append(pinned, self, "-echo")...)
		server := at.vm.Command(context.Background(), line[0], line[1:]...)
		if err := server.Start(); err != nil {
			return stop, err
		}
		started = append(started, server)
	}
	return stop, nil
}

// enter is the start of a command line in a pod's namespace.
func enter(pod string) []string {
	if pod == "" {
		return []string{"env"}
	}
	return []string{"nsenter", "--net=/run/netns/" + pod}
}

func (p *path) measure(self string, ours []*vnetsim.VM) error {
	if p.call != "" {
		for _, vm := range ours {
			if _, err := vm.Run(context.Background(), "sh", "-c", "echo "+p.call+" >/proc/sys/net/bridge/bridge-nf-call-iptables"); err != nil {
				return err
			}
		}
	}
	line := append(enter(p.client), append(pinned, self, "-ask", p.server.String())...)
	out, err := p.from.Command(context.Background(), line[0], line[1:]...).Output()
	if err != nil {
		return err
	}
	var turn, rate float64
	if _, err := fmt.Sscan(string(out), &turn, &rate); err != nil {
		return err
	}
	p.turn, p.rate = append(p.turn, turn), append(p.rate, rate)
	return nil
}

func median(all []float64) float64 { return slices.Sorted(slices.Values(all))[len(all)/2] }

func over(a, b []float64) []float64 {
	out := slices.Clone(a)
	for i := range out {
		out[i] /= b[i]
	}
	return out
}

// podNames are the pods that paths lead from and to, in the order in which they get the VM's addresses.
var podNames = []string{"c0", "c1", "pub"}

// pods makes in this VM the pods of the paths, n more, all of one mode, and one behind a masquerading bridge.
func pods(dir, mode string, n int) error {
	const ports = `,"runtimeConfig":{"portMappings":[{"hostPort":` + publishedPort + `,"containerPort":` + echoPort + `},{"hostPort":` + publishedPort + `,"containerPort":` + echoPort + `,"protocol":"udp"}]}`
	c := chains[0]
	c.conf += `,"mode":"` + mode + `"`
	for i, name := range podNames {
		with := c
		with.conf += []string{"", "", ports}[i]
		if err := pod(dir, with, name); err != nil {
			return err
		}
	}
	for i := range n {
		if err := pod(dir, c, fmt.Sprintf("p%d", i)); err != nil {
			return err
		}
	}
	return pod(dir, chains[2], "masq")
}

func pod(dir string, c chain, name string) error {
	if out, err := exec.Command("ip", "netns", "add", name).CombinedOutput(); err != nil {
		return fmt.Errorf("make a namespace: %w: %s", err, out)
	}
	_, err := call(dir, c, "ADD", name)
	return err
}

// echo answers datagrams and swallows connections.
func echo() error {
	udp, err := net.ListenPacket("udp4", ":"+echoPort)
	if err != nil {
		return err
	}
	tcp, err := net.Listen("tcp4", ":"+echoPort)
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := tcp.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(io.Discard, c); c.Close() }()
		}
	}()
	buf := make([]byte, 64)
	for {
		n, from, err := udp.ReadFrom(buf)
		if err != nil {
			return err
		}
		if _, err := udp.WriteTo(buf[:n], from); err != nil {
			return err
		}
	}
}

// ask prints how long a datagram's round trip takes, and how much one connection carries.
func ask(to string) error {
	turn, err := turns(to)
	if err != nil {
		return err
	}
	rate, err := stream(to)
	if err != nil {
		return err
	}
	fmt.Println(turn, rate)
	return nil
}

// turns is µs: the mean of the fastest slice of the time, for what else runs on the machine only adds.
func turns(to string) (float64, error) {
	c, err := net.Dial("udp4", to)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	buf := make([]byte, 64)
	turn := func() error {
		_ = c.SetReadDeadline(time.Now().Add(time.Second))
		if _, err := c.Write(buf[:16]); err != nil {
			return err
		}
		_, err := c.Read(buf)
		return err
	}
	for tries := 10; turn() != nil; tries-- { // the server may not listen yet
		if tries == 0 {
			return 0, errors.New("no answer from " + to)
		}
		time.Sleep(50 * time.Millisecond)
	}
	fastest := math.Inf(1)
	for range slicesOfPath {
		start, n := time.Now(), 0
		for ; time.Since(start) < pathTime/slicesOfPath || n == 0; n++ {
			if err := turn(); err != nil {
				return 0, err
			}
		}
		fastest = min(fastest, float64(time.Since(start).Nanoseconds())/1000/float64(n))
	}
	return fastest, nil
}

// stream is Gbit/s.
func stream(to string) (float64, error) {
	c, err := net.DialTimeout("tcp4", to, 5*time.Second)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	buf := []byte(strings.Repeat("x", 128<<10))
	sent := 0
	start := time.Now()
	for time.Since(start) < pathTime {
		n, err := c.Write(buf)
		if err != nil {
			return 0, err
		}
		sent += n
	}
	return float64(sent) * 8 / float64(time.Since(start).Nanoseconds()), nil
}
