// Copyright (c) The azure-vnet authors. MIT licence.

package ebtables

import (
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// upstreams are the rules of Azure's own azure-vnet as a host of 2018 has them.
var upstreams = []string{
	"PREROUTING -p ARP --arp-op Request --arp-ip-dst 10.240.0.4 -j arpreply --arpreply-mac 00:0d:3a:04:00:01",
	"PREROUTING -p ARP -i eth0 --arp-op Reply -j dnat --to-dst ff:ff:ff:ff:ff:ff --dnat-target ACCEPT",
	"PREROUTING -p ARP --arp-op Request --arp-ip-dst 10.240.0.5 -j arpreply --arpreply-mac 42:21:c2:04:c7:cd",
	"PREROUTING -p IPv4 -i eth0 --ip-dst 10.240.0.5 -j dnat --to-dst 42:21:c2:04:c7:cd --dnat-target ACCEPT",
	"POSTROUTING -s Unicast -o eth0 -j snat --to-src 00:0d:3a:04:00:01 --snat-arp --snat-target ACCEPT",
}

// Rules of either kind of ebtables are found, and the commands delete them and nothing else.
func TestRulesOfEachKind(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make a network namespace")
	}
	for _, kind := range []string{"nft", "legacy"} {
		t.Run(kind, func(t *testing.T) {
			runtime.LockOSThread() // and never unlocked: the thread ends with its namespace
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				t.Fatal(err)
			}
			run := func(line string) (string, error) {
				words := strings.Fields(line)
				out, err := exec.Command(words[0], words[1:]...).CombinedOutput()
				return string(out), err
			}
			concerns := func(rule []string) bool {
				return slices.ContainsFunc(rule, func(w string) bool { return w == "eth0" || strings.HasPrefix(w, "10.240.0.") })
			}
			if got, err := DeleteCommands(concerns); err != nil || len(got) > 0 {
				t.Errorf("without any table: %q, %v", got, err)
			}
			others := []string{"PREROUTING -i vnet0 -j DROP", "PREROUTING -p IPv4 --ip-dst 192.0.2.1 -j ACCEPT", "OUTPUT -o eth01 -j ACCEPT"}
			for _, rule := range others {
				if out, err := run("ebtables-" + kind + " -t nat -A " + rule); err != nil {
					t.Skipf("this machine has no ebtables-%s: %v: %s", kind, err, out)
				}
			}
			if got, err := DeleteCommands(concerns); err != nil || len(got) > 0 {
				t.Errorf("with rules of others alone: %q, %v", got, err)
			}
			list := func() (all string) {
				for _, chain := range chains {
					out, _ := run("ebtables-" + kind + " -t nat -L " + chain)
					all += out
				}
				return all
			}
			before := list()
			for _, rule := range upstreams {
				if out, err := run("ebtables-" + kind + " -t nat -A " + rule); err != nil {
					t.Fatalf("%s: %v: %s", rule, err, out)
				}
			}
			got, err := DeleteCommands(concerns)
			if err != nil || len(got) != len(upstreams) {
				t.Fatalf("of %d rules: %q, %v", len(upstreams), got, err)
			}
			for _, command := range got {
				if out, err := run(command); err != nil {
					t.Errorf("%s: %v: %s", command, err, out)
				}
			}
			if after := list(); after != before {
				t.Errorf("the rules of others were\n%s\nand are\n%s", before, after)
			}
			t.Setenv("PATH", "")
			if got, err := DeleteCommands(concerns); err == nil || len(got) > 0 || !strings.Contains(err.Error(), "there is no program ebtables-"+kind) {
				t.Errorf("without a program: %q, %v", got, err)
			}
		})
	}
}
