// Copyright (c) The azure-vnet authors. MIT licence.

// Package ebtables finds rules of others in ebtables' table nat, such as those that Azure's own azure-vnet
// leaves behind. These rules answer ARP for addresses, and lead frames to MACs, that are gone. The package
// reads, and changes nothing.
package ebtables

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"azurevnet/bridge/internal/nfnl"
)

// table is the table in which Azure's own azure-vnet has its rules.
const table = "nat"

// chains are the chains that every such table has.
var chains = []string{"PREROUTING", "OUTPUT", "POSTROUTING"}

// DeleteCommands returns the commands that delete those rules for which concerns is true, of both kinds of
// ebtables. concerns gets a rule as its words, as ebtables prints them. On a host without rules, this asks the
// kernel a few questions and starts no program.
func DeleteCommands(concerns func(rule []string) bool) (commands []string, err error) {
	var errs []error
	for _, kind := range []struct {
		name  string
		count func() (int, error)
	}{{"nft", countNftRules}, {"legacy", countLegacyRules}} {
		n, err := kind.count()
		if err == nil && n > 0 {
			var found []string
			found, err = listRules(kind.name, concerns)
			commands = append(commands, found...)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("ebtables-%s: %w", kind.name, err))
		}
	}
	return commands, errors.Join(errs...)
}

// countNftRules counts the rules that ebtables-nft has made.
func countNftRules() (n int, err error) {
	for _, chain := range chains {
		rules, err := nfnl.ReadRules(unix.NFPROTO_BRIDGE, table, chain)
		if err != nil {
			return n, err
		}
		n += len(rules)
	}
	return n, nil
}

// The socket option that asks for a table of legacy ebtables (EBT_SO_GET_INFO), and its answer: struct
// ebt_replace of linux/netfilter_bridge/ebtables.h.
const ebtSoGetInfo = 128

type ebtReplace struct {
	name        [32]byte
	validHooks  uint32
	nentries    uint32
	entriesSize uint32
	hookEntry   [6]uintptr
	numCounters uint32
	counters    uintptr
	entries     uintptr
}

// countLegacyRules counts the rules of legacy ebtables. To ask for the table would load its kernel module. So
// the list of modules comes first: without the module there is no rule.
func countLegacyRules() (int, error) {
	modules, err := os.ReadFile("/proc/modules")
	loaded := func(line string) bool { return strings.HasPrefix(line, "ebtable_nat ") }
	if err != nil || !slices.ContainsFunc(strings.Split(string(modules), "\n"), loaded) {
		return 0, nil
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	var info ebtReplace
	copy(info.name[:], table)
	size := uint32(unsafe.Sizeof(info))
	if _, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.IPPROTO_IP, ebtSoGetInfo,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0); errno != 0 {
		return 0, nil // this namespace has no such table
	}
	return int(info.nentries), nil
}

// listRules has the program list the rules.
func listRules(kind string, concerns func([]string) bool) (commands []string, err error) {
	program, err := findProgram(kind)
	if err != nil {
		return nil, err
	}
	for _, chain := range chains {
		out, err := exec.Command(program, "-t", table, "-L", chain).Output()
		if err != nil {
			return commands, fmt.Errorf("list the chain %s: %w", chain, err)
		}
		for line := range strings.Lines(string(out)) {
			rule := strings.Fields(line)
			if len(rule) > 0 && strings.HasPrefix(rule[0], "-") && concerns(rule) {
				commands = append(commands, fmt.Sprintf("ebtables-%s -t %s -D %s %s", kind, table, chain, strings.Join(rule, " ")))
			}
		}
	}
	return commands, nil
}

// findProgram finds the ebtables program of that kind: by its own name, or as ebtables.
func findProgram(kind string) (string, error) {
	if path, err := exec.LookPath("ebtables-" + kind); err == nil {
		return path, nil
	}
	if path, err := exec.LookPath("ebtables"); err == nil {
		said, err := exec.Command(path, "--version").Output()
		if is := strings.Contains(string(said), "nf_tables"); err == nil && is == (kind == "nft") {
			return path, nil
		}
	}
	return "", fmt.Errorf("its table %s has rules, and there is no program ebtables-%s here to read them: on the host, delete those that name a NIC or an address of it (ebtables -t %s -L)", table, kind, table)
}
