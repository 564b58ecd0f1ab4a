// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"unsafe"

	"github.com/coreos/go-iptables/iptables"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"
)

// hostRule is a rule of ours in iptables, known again by its comment.
type hostRule struct {
	table, chain string
	comment      string
	spec         []string
}

const ruleComment = "azure-vnet:"

// masqueraded is what an endpoint's network marked for SNAT.
var masqueraded = hostRule{"nat", "POSTROUTING", ruleComment + "snat",
	[]string{"-m", "mark", "--mark", fmt.Sprintf("%#x/%#x", snatMark, snatMark), "-j", "MASQUERADE"}}

// forwarded lets what comes in by one bridge leave by another, or the same:
// Docker's FORWARD policy is DROP, and bridged frames too pass it under
// bridge-nf-call-iptables.
func forwarded(in, out string) hostRule {
	return hostRule{"filter", "FORWARD", ruleComment + in + "/" + out, []string{"-i", in, "-o", out, "-j", "ACCEPT"}}
}

// words is the rule as iptables takes it.
func (r hostRule) words() []string {
	return append([]string{"-m", "comment", "--comment", r.comment}, r.spec...)
}

// backend is one of the two iptables, which do not see each other's rules: an
// ACCEPT in one does not lift the other's DROP.
type backend struct {
	name  string
	rules []hostRule                                        // wanted
	found func(table, chain string) (map[string]int, error) // comments of ours there, without exec
}

// backends are those in use, with the rules that each needs. One MASQUERADE is
// enough: the kernel asks both, and takes the first answer. nics are those of the
// VM's without a bridge: IMDS may be behind one.
func backends(bridges []Bridge, nics []string) ([]backend, error) {
	var accepts []hostRule
	for _, in := range bridges {
		for _, out := range bridges {
			accepts = append(accepts, forwarded(in.Name, out.Name))
		}
		for _, nic := range nics {
			accepts = append(accepts, forwarded(in.Name, nic), forwarded(nic, in.Name))
		}
	}
	nft := backend{"nft", accepts, foundNFT}
	if len(bridges) > 0 {
		nft.rules = append(slices.Clone(accepts), masqueraded)
	}
	legacy, err := legacyTables()
	if err != nil {
		return nil, err
	}
	if slices.Contains(legacy, "filter") {
		return []backend{nft, {"legacy", accepts, foundLegacy}}, nil
	}
	return []backend{nft}, nil
}

// ensureRules makes the host's iptables rules what bridges ask for, in every
// back-end in use, and names what it mended. Rules that stand cost no exec.
func (h *Host) ensureRules(bridges []Bridge) (mended []string, err error) {
	all, err := h.backends(bridges)
	if err != nil {
		return nil, err
	}
	for _, b := range all {
		done, err := b.sync()
		mended = append(mended, done...)
		if err != nil {
			return mended, fmt.Errorf("iptables-%s rules: %w", b.name, err)
		}
	}
	return mended, nil
}

// backends are those in use on this host.
func (h *Host) backends(bridges []Bridge) ([]backend, error) {
	nics, err := h.bare()
	if err != nil {
		return nil, fmt.Errorf("iptables rules: %w", err)
	}
	nics = slices.DeleteFunc(nics, func(nic string) bool {
		return slices.ContainsFunc(bridges, func(b Bridge) bool { return b.NIC == nic })
	})
	all, err := backends(bridges, nics)
	if err != nil {
		return nil, fmt.Errorf("iptables rules: %w", err)
	}
	return all, nil
}

// bare names the VM's NICs, as far as known, that are in no bridge.
func (h *Host) bare() ([]string, error) {
	s, err := h.state()
	if err != nil {
		return nil, err
	}
	links, err := readLinks()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, mac := range s.NICs {
		if hw, err := parseMAC(mac); err == nil {
			if l, err := links.nic(hw); err == nil && l.Attrs().MasterIndex == 0 {
				out = append(out, l.Attrs().Name)
			}
		}
	}
	return out, nil
}

// dropRules removes them all. None is success.
func (h *Host) dropRules() error {
	_, err := h.ensureRules(nil)
	return err
}

// wrong is what lacks and what is too much.
func (b backend) wrong() (add, del []hostRule, err error) {
	for _, at := range []hostRule{{table: "filter", chain: "FORWARD"}, {table: "nat", chain: "POSTROUTING"}} {
		has, err := b.found(at.table, at.chain)
		if err != nil {
			return nil, nil, fmt.Errorf("read %s %s: %w", at.table, at.chain, err)
		}
		for _, r := range b.rules {
			if r.table != at.table {
				continue
			}
			if has[r.comment] == 0 {
				add = append(add, r)
			}
			has[r.comment]--
		}
		for comment, n := range has {
			for range n {
				del = append(del, ruleOf(comment))
			}
		}
	}
	return add, del, nil
}

// sync adds what lacks and deletes what is too much. Adding is before deleting.
func (b backend) sync() (mended []string, err error) {
	add, del, err := b.wrong()
	if err != nil || len(add)+len(del) == 0 {
		return nil, err
	}
	run, err := b.command()
	if err != nil {
		return nil, err
	}
	for _, r := range add {
		// First in the chain: a DROP of another must not come before.
		if err := run.Insert(r.table, r.chain, 1, r.words()...); err != nil {
			return mended, fmt.Errorf("add %s: %w", r.comment, err)
		}
		if has, err := b.found(r.table, r.chain); err != nil || has[r.comment] == 0 {
			return mended, errors.Join(err, fmt.Errorf("%s is not there after it was added: the iptables program installed is not the %s one", r.comment, b.name))
		}
		mended = append(mended, "iptables-"+b.name+": added "+r.comment)
	}
	for _, r := range del {
		if err := run.DeleteIfExists(r.table, r.chain, r.words()...); err != nil {
			return mended, fmt.Errorf("delete %s: %w", r.comment, err)
		}
		mended = append(mended, "iptables-"+b.name+": deleted "+r.comment)
	}
	return mended, nil
}

// ruleOf is the rule that a comment of ours stands for.
func ruleOf(comment string) hostRule {
	if comment == masqueraded.comment {
		return masqueraded
	}
	in, out, _ := strings.Cut(strings.TrimPrefix(comment, ruleComment), "/") // which no link's name has
	return forwarded(in, out)
}

// command finds the back-end's program: by its own name, or as iptables.
func (b backend) command() (*iptables.IPTables, error) {
	for _, name := range []string{"iptables-" + b.name, "iptables"} {
		if path, err := exec.LookPath(name); err == nil {
			return iptables.New(iptables.Path(path), iptables.Timeout(5))
		}
	}
	return nil, fmt.Errorf("neither iptables-%s nor iptables is installed: install the package iptables", b.name)
}

var ourComment = regexp.MustCompile(ruleComment + `[[:graph:]]+`)

// countComments counts the comments of ours in b.
func countComments(count map[string]int, b []byte) {
	for _, m := range ourComment.FindAll(b, -1) {
		count[string(m)]++
	}
}

// foundNFT reads the rules that iptables-nft wrote.
func foundNFT(table, chain string) (map[string]int, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, err
	}
	count := map[string]int{}
	rules, err := c.GetRules(&nftables.Table{Name: table, Family: nftables.TableFamilyIPv4}, &nftables.Chain{Name: chain})
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return count, nil
		}
		return nil, err
	}
	for _, r := range rules {
		countComments(count, r.UserData)
		for _, e := range r.Exprs {
			if m, ok := e.(*expr.Match); ok {
				if comment, ok := m.Info.(*xt.Comment); ok {
					countComments(count, []byte(*comment))
				}
			}
		}
	}
	return count, nil
}

// legacyTables are the tables that legacy iptables has loaded in this namespace.
func legacyTables() ([]string, error) {
	names, err := os.ReadFile("/proc/thread-self/net/ip_tables_names")
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return strings.Fields(string(names)), err
}

// Of linux/netfilter_ipv4/ip_tables.h.
const (
	iptGetInfo    = 64
	iptGetEntries = 65
)

// foundLegacy reads legacy iptables' table as it lies in the kernel. It is asked
// of loaded tables only, since the question loads one.
func foundLegacy(table, chain string) (map[string]int, error) {
	count := map[string]int{}
	loaded, err := legacyTables()
	if err != nil || !slices.Contains(loaded, table) {
		return count, err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	// struct ipt_getinfo: name[32], 11 words, number of entries at 76, their size at 80.
	info := make([]byte, 84)
	copy(info, table)
	if err := getsockopt(fd, iptGetInfo, info); err != nil {
		return nil, err
	}
	// struct ipt_get_entries: name[32], size, entries aligned to 8.
	size := native.Uint32(info[80:])
	entries := make([]byte, 40+size)
	copy(entries, table)
	native.PutUint32(entries[32:], size)
	if err := getsockopt(fd, iptGetEntries, entries); err != nil {
		return nil, err
	}
	countComments(count, bytes.ReplaceAll(entries[40:], []byte{0}, []byte{' '}))
	return count, nil
}

func getsockopt(fd, name int, value []byte) error {
	size := uint32(len(value))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.IPPROTO_IP, uintptr(name),
		uintptr(unsafe.Pointer(&value[0])), uintptr(unsafe.Pointer(&size)), 0)
	runtime.KeepAlive(value)
	if errno != 0 {
		return errno
	}
	return nil
}
