// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"net"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
)

// argsOfPod is CNI_ARGS as kubelet's runtimes send it.
const argsOfPod = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=u1"

// rowOf is the line of a text that has the word, with single blanks.
func rowOf(text, word string) string {
	for line := range strings.Lines(text) {
		if strings.Contains(line, word) {
			return strings.Join(strings.Fields(line), " ")
		}
	}
	return ""
}

// TestStatusNamesPods beside the container's id, whoever lends the address, and after leases.json was lost.
func TestStatusNamesPods(t *testing.T) {
	ipam := otherIPAM(t)
	for _, tt := range []struct {
		name, args, conf string
		words            []string
		want             string // of the last word's text
	}{
		{"a pod", argsOfPod, host, []string{"ADD", "status"}, "10.240.0.5 cni/azure/c1/eth0 shop/web-0 " + link + " azure0"},
		{"the counts of a NIC", argsOfPod, host, []string{"ADD", "status"}, "00:0d:3a:04:75:98 10.240.0.0/16 3 ipconfigs: 1 the NIC's own, 1 held, 1 free"},
		{"a container of no pod", "", host, []string{"ADD", "status"}, "10.240.0.5 cni/azure/c1/eth0 " + link + " azure0"},
		{"with leases.json lost", argsOfPod, host, []string{"ADD", "lose-leases", "status"}, "10.240.0.5 cni/azure/c1/eth0 shop/web-0 " + link + " azure0"},
		{"with leases.json made anew", argsOfPod, host, []string{"ADD", "lose-leases", "reconcile", "status"}, "10.240.0.5 cni/azure/c1/eth0 shop/web-0 " + link + " azure0"},
		{"another IPAM", argsOfPod, strings.Replace(host, "azure-vnet-ipam", "other", 1), []string{"ADD", "status"}, "10.240.0.77 cni/azure/c1/eth0 shop/web-0 " + link + " azure0"},
		{"a name that no pod can have", "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web\x1b[2J 0", host, []string{"ADD", "status"}, "10.240.0.5 cni/azure/c1/eth0 " + link + " azure0"},
		{"what is broken", argsOfPod, host, []string{"ADD", "break-routes", "status"}, "broken: " + link + " (10.240.0.5, pod shop/web-0): no route in table 16863"},
		{"what is mended", argsOfPod, host, []string{"ADD", "break-routes", "reconcile"}, "mended: " + link + " (10.240.0.5, pod shop/web-0): no route in table 16863"},
		{"a lease that is found again", argsOfPod, host, []string{"ADD", "lose-leases", "reconcile"}, "leased again: 10.240.0.5, which cni/azure/c1/eth0 (pod shop/web-0) has"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			all := onOneHostWith(t, tt.args, "", tt.conf, ipam, tt.words...)
			if all[0].Code != 0 {
				t.Fatalf("ADD: code %d, %s", all[0].Code, all[0].Msg)
			}
			text := all[len(all)-1].Text
			if got := rowOf(text, tt.want[:strings.Index(tt.want, " ")]); got != tt.want {
				t.Errorf("got  %q\nwant %q in\n%s", got, tt.want, text)
			}
		})
	}
}

// TestEveryLineOfTheLogNamesThePod beside the container's id: also of a call that is refused before its
// configuration is read, and of a GC, which is no container's.
func TestEveryLineOfTheLogNamesThePod(t *testing.T) {
	const named = "container=c1 ifname=eth0 netns=/run/netns/c1 pod=shop/web-0"
	gc := with(`"cni.dev/valid-attachments":[],`)
	for _, tt := range []struct {
		name, conf string
		words      []string
		want       string // in the log's last line
	}{
		{"ADD", host, []string{"ADD"}, "level=INFO msg=azure-vnet verb=ADD network=azure " + named + " address=10.240.0.5"},
		{"CHECK", host, []string{"ADD", "CHECK"}, "verb=CHECK network=azure " + named},
		{"DEL", host, []string{"ADD", "DEL"}, "verb=DEL network=azure " + named + " link=" + link + " released=[10.240.0.5]"},
		{"an ADD that fails", with(`"mtu":9000,`), []string{"ADD"}, "level=ERROR msg=azure-vnet verb=ADD network=azure " + named},
		{"a wrong configuration", with(`"mtu":1,`), []string{"ADD"}, "level=ERROR msg=azure-vnet verb=ADD network=azure " + named},
		{"a version that is none", strings.Replace(host, "1.1.0", "9.9.9", 1), []string{"ADD"}, "level=ERROR msg=azure-vnet verb=ADD network=azure " + named},
		{"GC", gc, []string{"ADD", "GC"}, `collected=1 of="cni/azure/c1/eth0 (pod shop/web-0)"`},
		{"GC, with leases.json lost", gc, []string{"ADD", "lose-leases", "GC"}, `collected=1 of="cni/azure/c1/eth0 (pod shop/web-0)"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			all := onOneHostWith(t, argsOfPod, "", tt.conf, "/nowhere", append(tt.words, "log")...)
			lines := strings.Split(strings.TrimSpace(all[len(all)-1].Text), "\n")
			if last := lines[len(lines)-1]; !strings.Contains(last, tt.want) {
				t.Errorf("%q is not in\n%s", tt.want, last)
			}
		})
	}
}

// TestSyslogGetsEachDoublingOfARow of identical failures, for it takes no line back.
func TestSyslogGetsEachDoublingOfARow(t *testing.T) {
	words := strings.Fields("ADD ADD ADD ADD ADD ADD ADD ADD ADD syslog")
	all := onOneHostWith(t, argsOfPod, "syslog listens", with(`"mtu":9000,"logTarget":"syslog",`), "/nowhere", words...)
	var got []string
	for _, m := range regexp.MustCompile(`level=(\w+) .*verb=(\w+) .*pod=(\S+) .*(times=\d+)`).FindAllStringSubmatch(all[len(all)-1].Text, -1) {
		got = append(got, strings.Join(m[1:], " "))
	}
	const row = "ERROR ADD shop/web-0 times="
	if diff := cmp.Diff([]string{row + "1", row + "2", row + "4", row + "8"}, got); diff != "" {
		t.Errorf("%s in\n%s", diff, all[len(all)-1].Text)
	}
}

// listenAsSyslog opens a socket in syslog's place. What is sent stays in it until readSyslog.
func listenAsSyslog(netlink.Link) error {
	const socket = "/run/log" // one of the places where package syslog looks
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		return err
	}
	if _, err := os.Stat("/dev/log"); err == nil { // where it looks first: this machine's own syslog
		if err := syscall.Mount(socket, "/dev/log", "", syscall.MS_BIND, ""); err != nil {
			return err
		}
	}
	syslogSocket = l
	return nil
}

// syslogSocket has what was sent and not read.
var syslogSocket *net.UnixConn

// readSyslog reads what has come.
func readSyslog() ([]byte, error) {
	raw, err := syslogSocket.SyscallConn()
	if err != nil {
		return nil, err
	}
	var text []byte
	bad := raw.Control(func(fd uintptr) {
		for {
			line := make([]byte, 8192)
			n, _, err := syscall.Recvfrom(int(fd), line, syscall.MSG_DONTWAIT)
			if err != nil {
				return
			}
			text = append(append(text, line[:n]...), '\n')
		}
	})
	return text, bad
}
