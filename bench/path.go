// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
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
const pathTime = 500 * time.Millisecond

const echoPort = "7007"

// path is a way from a client on one VM to a server on another.
type path struct {
	name   string
	client []string // begins a command there, on the first VM
	server netip.Addr

	turn, rate []float64 // µs of a datagram's round trip; Gbit/s of one TCP connection
}

// paths measures what the wire costs a packet, between two VMs, each path in turn.
func paths(dir, self string, rounds, standing int) error {
	vnet, err := vnetsim.New(vnetsim.Config{})
	if err != nil {
		return err
	}
	defer vnet.Close()
	var vms []*vnetsim.VM
	for range 2 {
		vm, err := vnet.AddVM(vnetsim.VMConfig{Secondaries: standing + 4})
		if err != nil {
			return err
		}
		vms = append(vms, vm)
		setUp := vm.Command(context.Background(), self, "-inside", dir, "-pods", strconv.Itoa(standing+1))
		if out, err := setUp.CombinedOutput(); err != nil {
			return fmt.Errorf("pods on %s: %w: %s", vm.Name, err, out)
		}
	}
	pod := vms[1].Secondaries()[0]
	in := func(name string) []string { return []string{"nsenter", "--net=/run/netns/" + name, self} }
	for _, at := range [][]string{{self}, in("p0")} {
		echo := vms[1].Command(context.Background(), at[0], append(at[1:], "-echo")...)
		if err := echo.Start(); err != nil {
			return err
		}
		defer func() { _ = echo.Process.Kill(); _ = echo.Wait() }()
	}
	all := []*path{
		{name: "host to host", client: []string{self}, server: vms[1].Primary},
		{name: "container to container", client: in("p0"), server: pod},
		{name: "bridge and masquerade to host", client: in("masq"), server: vms[1].Primary},
	}
	for range rounds {
		for _, p := range all {
			arg := append(slices.Clone(p.client[1:]), "-ask", p.server.String())
			out, err := vms[0].Command(context.Background(), p.client[0], arg...).Output()
			if err != nil {
				return fmt.Errorf("%s: %w", p.name, err)
			}
			var turn, rate float64
			if _, err := fmt.Sscan(string(out), &turn, &rate); err != nil {
				return fmt.Errorf("%s: %w", p.name, err)
			}
			p.turn, p.rate = append(p.turn, turn), append(p.rate, rate)
		}
	}
	fmt.Printf("\n%-32s %12s %8s %12s %8s   (medians of %d rounds, %d containers a VM; the ratio is to host to host, round by round)\n",
		"path between two VMs", "UDP µs", "ratio", "TCP Gbit/s", "ratio", rounds, standing+1)
	for _, p := range all {
		fmt.Printf("%-32s %12.1f %8.2f %12.2f %8.2f\n", p.name, median(p.turn), median(over(p.turn, all[0].turn)), median(p.rate), median(over(p.rate, all[0].rate)))
	}
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

// pods makes n containers of azure-vnet in this VM, p0 and on, and one behind a
// masquerading bridge.
func pods(dir string, n int) error {
	for i := range n {
		if err := pod(dir, chains[0], fmt.Sprintf("p%d", i)); err != nil {
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
func ask(server string) error {
	to := net.JoinHostPort(server, echoPort)
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

// turns is µs.
func turns(to string) (float64, error) {
	c, err := net.Dial("udp4", to)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	buf := make([]byte, 64)
	lost, n := 0, 0
	start := time.Now()
	for time.Since(start) < pathTime || n == 0 {
		_ = c.SetReadDeadline(time.Now().Add(time.Second))
		if _, err := c.Write(buf[:16]); err == nil {
			_, err = c.Read(buf)
			if err == nil {
				n++
				continue
			}
		}
		if lost++; lost == 10 { // the server may not listen yet
			return 0, errors.New("no answer from " + to)
		}
		time.Sleep(50 * time.Millisecond)
		start, n = time.Now(), 0
	}
	return float64(time.Since(start).Nanoseconds()) / 1000 / float64(n), nil
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
