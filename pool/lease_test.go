// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"azurevnet/internal/statefile"
)

var compareAddr = cmp.Options{
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
}

func TestALeaseSaysWhatItIs(t *testing.T) {
	f := azure(nic(mac1, "10.240.0.0/16", 3))
	p := newPool(t, f)
	got := p.must(t, Request{Owner: "docker/p1"})
	want := Lease{Addr: addr("10.240.0.5"), Owner: "docker/p1", MAC: mac1, Prefix: prefix("10.240.0.0/16"), Since: f.now}
	if got != want {
		t.Errorf("lease is %+v, not %+v", got, want)
	}
	if held, ok, err := p.FindLease(t.Context(), got.Addr); held != want || !ok || err != nil {
		t.Errorf("held is %+v, %v, %v", held, ok, err)
	}
	if held, ok, err := p.FindLease(t.Context(), addr("10.240.0.6")); held != (Lease{}) || ok || err != nil {
		t.Errorf("held is %+v, %v, %v", held, ok, err)
	}
}

// Never used before used, the one freed longest ago first, cooling last.
func TestTheOrderInWhichAddressesAreLent(t *testing.T) {
	f := azure(nic(mac1, "10.0.0.0/24", 5)) // .5 to .8 can be lent
	p := newPool(t, f)
	lend := func() string {
		f.pass(time.Second)
		l := p.must(t, Request{Owner: "o"})
		if l.Early {
			return l.Addr.String() + " early"
		}
		return l.Addr.String()
	}
	free := func(a string) {
		f.pass(time.Second)
		if ok, err := p.Release(t.Context(), "o", addr(a)); !ok || err != nil {
			t.Fatalf("release %s: %v, %v", a, ok, err)
		}
	}
	got := []string{lend(), lend()}
	free("10.0.0.6")
	free("10.0.0.5")
	f.pass(time.Minute)
	got = append(got, lend(), lend(), lend(), lend()) // two new ones, then .6 before .5
	free("10.0.0.7")
	f.pass(defaultCoolDown)
	free("10.0.0.6")
	free("10.0.0.5")
	got = append(got, lend(), lend(), lend()) // .7 has rested; then those that cool, oldest first
	want := []string{"10.0.0.5", "10.0.0.6", "10.0.0.7", "10.0.0.8", "10.0.0.6", "10.0.0.5",
		"10.0.0.7", "10.0.0.6 early", "10.0.0.5 early"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("order (-want +got):\n%s", diff)
	}
}

func TestAnAddressAskedForByNameIsGivenWhileItCools(t *testing.T) {
	f := azure(nic(mac1, "10.0.0.0/24", 5))
	p := newPool(t, f)
	l := p.must(t, Request{Owner: "o"})
	p.Release(t.Context(), "o", l.Addr)
	f.pass(time.Second)
	if again := p.must(t, Request{Owner: "o", Addr: l.Addr}); again.Addr != l.Addr || again.Early || again.Since == l.Since {
		t.Errorf("lease is %+v", again)
	}
}

func TestRequestsThatCannotBeServedSayWhy(t *testing.T) {
	f := azure(nic(mac1, "10.0.0.0/24", 6), nic(mac2, "10.0.1.0/24", 2))
	p := newPool(t, f)
	f.occupied.onHost = map[netip.Addr]string{addr("10.0.0.9"): "eth0"}
	p.must(t, Request{Owner: "web", Addr: addr("10.0.0.5")})
	for _, test := range []struct {
		name string
		r    Request
		want error
		says []string
	}{
		{"in use", Request{Addr: addr("10.0.0.5")}, ErrInUse, []string{"10.0.0.5", "web"}},
		{"outside the subnet", Request{Addr: addr("10.0.1.5")}, ErrNotOurs, []string{"10.0.1.5", "10.0.0.0/24"}},
		{"the NIC's own", Request{Addr: addr("10.0.0.4")}, ErrNotOurs, []string{"own address", mac1}},
		{"the gateway", Request{Addr: addr("10.0.0.1")}, ErrNotOurs, []string{"gateway"}},
		{"one that Azure reserves", Request{Addr: addr("10.0.0.3")}, ErrNotOurs, []string{"Azure reserves it"}},
		{"the broadcast address", Request{Addr: addr("10.0.0.255")}, ErrNotOurs, []string{"as the broadcast address of subnet 10.0.0.0/24"}},
		{"not an ipconfig", Request{Addr: addr("10.0.0.77")}, ErrNotOurs, []string{"az network nic ip-config create", "--private-ip-address 10.0.0.77"}},
		{"on the host", Request{Addr: addr("10.0.0.9")}, ErrNotOurs, []string{"eth0", "reclaim=on", "90-azure-vnet.cfg"}},
		{"another subnet", Request{Prefix: prefix("10.9.0.0/16")}, ErrNotOurs, []string{"10.9.0.0/16", "10.0.0.0/24", "10.0.1.0/24"}},
		{"the other NIC's subnet", Request{MAC: mac1, Prefix: prefix("10.0.1.0/24")}, ErrNotOurs, []string{mac1, mac2}},
		{"another NIC", Request{MAC: "00-0D-3A-00-00-01"}, ErrNotOurs, []string{"00:0d:3a:00:00:01", mac1}},
		{"no NIC at all", Request{MAC: "eth0"}, ErrNotOurs, []string{`"eth0"`}},
		{"a range outside", Request{Range: prefix("10.0.1.0/25")}, ErrNotOurs, []string{"10.0.1.0/25", "10.0.0.0/24"}},
		{"a range with nothing in it", Request{Range: prefix("10.0.0.128/25")}, ErrExhausted, []string{"10.0.0.128/25", "6 ipconfigs", "3 free", "widen"}},
	} {
		test.r.Owner = "me"
		_, err := p.Lease(t.Context(), test.r)
		t.Run(test.name, func(t *testing.T) { wants(t, err, test.want, test.says...) })
		if test.r.Addr.IsValid() {
			err := p.CheckLendable(t.Context(), mac1, prefix("10.0.0.0/24"), test.r.Addr)
			t.Run(test.name+", by Lendable", func(t *testing.T) { wants(t, err, test.want, test.says...) })
		}
	}
	if err := p.CheckLendable(t.Context(), mac1, prefix("10.0.0.0/24"), addr("10.0.0.6")); err != nil {
		t.Errorf("a free one: %v", err)
	}
	if _, err := p.Lease(t.Context(), Request{}); err == nil {
		t.Error("a lease for nobody")
	}
}

// Three ways to have nothing left, each with its own remedy.
func TestExhaustionSaysWhatHelps(t *testing.T) {
	host := map[netip.Addr]string{}
	for i := range 5 {
		host[addr(fmt.Sprintf("10.0.0.%d", 5+i))] = "eth0"
	}
	for _, test := range []struct {
		name    string
		configs int
		onHost  map[netip.Addr]string
		reclaim bool
		remedy  string
		says    []string
		not     string
	}{
		{"no secondary addresses", 1, nil, false, "", []string{"1 ipconfig and no secondary", "az network nic ip-config create"}, "cloud-init"},
		{"all in use", 6, nil, false, "", []string{"6 ipconfigs: 1 the NIC's own, 5 held; remove containers", "az network nic ip-config create"}, "cloud-init"},
		{"all on the host", 6, host, false, "", []string{"6 ipconfigs", "5 on the host", "10.0.0.5", "and 2 more", "eth0", "cloud-init", "set reclaim=on"}, "az network"},
		{"all on the host, and reclaimed", 6, host, true, "", []string{"5 on the host", "reclaim=on takes them back"}, "set reclaim"},
		{"all on the host, in another reader's words", 6, host, false, "press the button", []string{"press the button, and for the next boot", "90-azure-vnet.cfg"}, "reclaim"},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := azure(nic(mac1, "10.0.0.0/24", test.configs))
			f.occupied.onHost, f.reclaim, f.remedy = test.onHost, test.reclaim, test.remedy
			p := newPool(t, f)
			var err error
			for range 6 {
				if _, err = p.Lease(t.Context(), Request{Owner: "o"}); err != nil {
					break
				}
			}
			wants(t, err, ErrExhausted, test.says...)
			if strings.Contains(err.Error(), test.not) {
				t.Errorf("error says %q: %v", test.not, err)
			}
		})
	}
}

// A VM may have two NICs in one subnet. A user who asks for an address does not know which NIC has it.
func TestAnAddressOfTheVMsOtherNICIsToldAsSuch(t *testing.T) {
	other := nic(mac2, "10.0.0.0/24", 2)
	other.Primary = "false"
	other.Subnets[0].Addrs[0].Address, other.Subnets[0].Addrs[1].Address = "10.0.0.20", "10.0.0.21"
	p := newPool(t, azure(nic(mac1, "10.0.0.0/24", 2), other))
	for a, says := range map[string]string{"10.0.0.20": "it is the own address of NIC " + mac2, "10.0.0.21": "it is an ipconfig of NIC " + mac2 + " and not of NIC " + mac1} {
		_, err := p.Lease(t.Context(), Request{Owner: "o", MAC: mac1, Addr: addr(a)})
		wants(t, err, ErrNotOurs, a, says)
		if strings.Contains(err.Error(), "az network") {
			t.Errorf("Azure would refuse what is advised: %v", err)
		}
	}
}

func TestAReleaseFreesOnlyWhatItsOwnerHolds(t *testing.T) {
	p := newPool(t, azure(nic(mac1, "10.0.0.0/24", 4)))
	a, b := p.must(t, Request{Owner: "a"}), p.must(t, Request{Owner: "b"})
	for _, test := range []struct {
		owner string
		addr  netip.Addr
		want  bool
	}{
		{"a", b.Addr, false}, {"a", addr("10.0.0.7"), false}, {"a", addr("192.0.2.1"), false},
		{"a", a.Addr, true}, {"a", a.Addr, false},
	} {
		if got, err := p.Release(t.Context(), test.owner, test.addr); got != test.want || err != nil {
			t.Errorf("release %s of %s: %v, %v", test.addr, test.owner, got, err)
		}
	}
	p.must(t, Request{Owner: "b"})
	if freed, err := p.ReleaseOwners(t.Context(), "b"); err != nil || len(freed) != 2 || freed[0] != b.Addr {
		t.Errorf("freed %v, %v", freed, err)
	}
	if freed, err := p.ReleaseOwners(t.Context(), "b"); err != nil || freed != nil {
		t.Errorf("freed again %v, %v", freed, err)
	}
}

func TestALeaseIsConfirmedOnlyAsItWasGiven(t *testing.T) {
	f := azure(nic(mac1, "10.0.0.0/24", 2))
	p := newPool(t, f)
	first := p.must(t, Request{Owner: "o"})
	for range 2 {
		if err := p.Confirm(t.Context(), first); err != nil {
			t.Error(err)
		}
	}
	p.Release(t.Context(), "o", first.Addr)
	wants(t, p.Confirm(t.Context(), first), ErrGone)
	f.pass(time.Second)
	second := p.must(t, Request{Owner: "o"})
	wants(t, p.Confirm(t.Context(), first), ErrGone)
	wants(t, p.MakeLinkless(t.Context(), first), ErrGone)
	if returned, err := p.Return(t.Context(), first); err != nil || returned {
		t.Errorf("a lease that has ended is returned: %v, %v", returned, err)
	}
	if err := p.Confirm(t.Context(), second); err != nil {
		t.Error(err)
	}
}

// An address that Azure took away is kept until it is released, and then gone;
// given back, it can be lent again.
func TestAnAddressWithdrawnWhileInUse(t *testing.T) {
	f := azure(nic(mac1, "10.0.0.0/24", 2))
	p := newPool(t, f)
	l := p.must(t, Request{Owner: "o"})
	f.list(nic(mac1, "10.0.0.0/24", 1))
	f.pass(time.Minute)
	if _, err := p.Lease(t.Context(), Request{Owner: "other"}); !errors.Is(err, ErrExhausted) {
		t.Fatal(err)
	}
	if err := p.Confirm(t.Context(), l); err != nil {
		t.Errorf("withdrawn and held: %v", err)
	}
	st, err := p.Status(t.Context())
	if c := st.NICs[0].Subnets[0].Census; err != nil || c != (Census{Configs: 1, Own: 1, Withdrawn: 1}) {
		t.Errorf("census is %+v, %v", c, err)
	}
	p.Release(t.Context(), "o", l.Addr)
	f.pass(time.Minute)
	_, err = p.Lease(t.Context(), Request{Owner: "other", Addr: l.Addr})
	wants(t, err, ErrNotOurs, "10.0.0.5")
	f.list(nic(mac1, "10.0.0.0/24", 2))
	f.pass(time.Minute)
	if got := p.must(t, Request{Owner: "other"}); got.Addr != l.Addr {
		t.Errorf("lent %s", got.Addr)
	}
}

func TestLeasesOfAnotherBootAreVoid(t *testing.T) {
	f := azure(nic(mac1, "10.0.0.0/24", 2))
	p := newPool(t, f)
	old := p.must(t, Request{Owner: "before"})
	err := statefile.Update(t.Context(), p.path, "test", func(s *state) error { s.Boot = "another"; return nil })
	if err != nil {
		t.Fatal(err)
	}
	f.fail(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }) // what was known is lent from
	f.mu.Lock()
	f.now = 5 * time.Second // and time begins anew
	f.mu.Unlock()
	now := p.must(t, Request{Owner: "after"})
	if now.Addr != old.Addr {
		t.Errorf("lent %s", now.Addr)
	}
	if ok, err := p.Release(t.Context(), "before", old.Addr); ok || err != nil {
		t.Errorf("a late release of the old boot: %v, %v", ok, err)
	}
	wants(t, p.Confirm(t.Context(), old), ErrGone)
}

func TestCollectEndsLeakedLeasesOnly(t *testing.T) {
	f := azure(nic(mac1, "10.0.0.0/24", 10))
	p := newPool(t, f)
	leaked, linked := p.must(t, Request{Owner: "leaked"}), p.must(t, Request{Owner: "linked"})
	p.must(t, Request{Owner: "linkless", Linkless: true})
	kept := p.must(t, Request{Owner: "kept"})
	renewed, confirmed := p.must(t, Request{Owner: "renewed"}), p.must(t, Request{Owner: "confirmed"})
	if err := p.MakeLinkless(t.Context(), kept); err != nil {
		t.Fatal(err)
	}
	f.pass(grace)
	p.must(t, Request{Owner: "young"})
	attached := func(ctx context.Context) (map[netip.Addr]bool, error) {
		// Meanwhile the world moves on, under a lock that nobody may hold.
		p.Release(ctx, "renewed", renewed.Addr)
		p.must(t, Request{Owner: "renewed", Addr: renewed.Addr})
		return map[netip.Addr]bool{linked.Addr: true}, p.Confirm(ctx, confirmed)
	}
	got, err := p.Collect(t.Context(), attached)
	if diff := cmp.Diff([]Lease{leaked}, got, compareAddr); err != nil || diff != "" {
		t.Errorf("collected (-want +got): %v\n%s", err, diff)
	}
	if _, ok, _ := p.FindLease(t.Context(), leaked.Addr); ok {
		t.Error("still held")
	}
	boom := errors.New("no netlink")
	_, err = p.Collect(t.Context(), func(context.Context) (map[netip.Addr]bool, error) { return nil, boom })
	wants(t, err, boom)
	if _, ok, _ := p.FindLease(t.Context(), linked.Addr); !ok {
		t.Error("released without proof")
	}
}

// An engine that was held up between a lease and its container has as long
// after the attachment as any other.
func TestALeaseConfirmedLateIsYoungAgain(t *testing.T) {
	f := azure(nic(mac1, "10.0.0.0/24", 3))
	p := newPool(t, f)
	l := p.must(t, Request{Owner: "slow"})
	collected := func() []Lease {
		got, err := p.Collect(t.Context(), func(context.Context) (map[netip.Addr]bool, error) { return nil, nil })
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	f.pass(2 * grace)
	if err := p.Confirm(t.Context(), l); err != nil {
		t.Fatal(err)
	}
	f.pass(grace - 1)
	if got := collected(); got != nil {
		t.Errorf("collected %v on its way into a container", got)
	}
	f.pass(1)
	if diff := cmp.Diff([]Lease{l}, collected(), compareAddr); diff != "" {
		t.Errorf("collected in the end (-want +got):\n%s", diff)
	}
}

// The file is lost while containers run: none of their addresses is lent.
func TestALostFileIsRebuiltFromLinks(t *testing.T) {
	for name, lose := range map[string]func(path string) error{
		"deleted":            os.Remove,
		"the directory gone": func(path string) error { return os.RemoveAll(filepath.Dir(path)) },
		"empty":              func(path string) error { return os.Truncate(path, 0) },
		"truncated":          func(path string) error { return os.Truncate(path, 40) },
		"NULs":               func(path string) error { return os.WriteFile(path, make([]byte, 300), 0o600) },
		"of another version": func(path string) error { return os.WriteFile(path, []byte(`{"version":9}`), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			p := newPool(t, azure(nic(mac1, "10.0.0.0/24", 4)))
			running := Lease{Addr: addr("10.0.0.5"), Owner: "running", MAC: mac1, Prefix: prefix("10.0.0.4/24")}
			asked := 0
			p.cfg.Links = func(context.Context) ([]Lease, error) { asked++; return []Lease{running}, nil }
			p.must(t, Request{Owner: "o"})
			if err := lose(p.path); err != nil {
				t.Fatal(err)
			}
			if l := p.must(t, Request{Owner: "new"}); l.Addr != addr("10.0.0.6") {
				t.Errorf("lent %s", l.Addr)
			}
			if l, ok, err := p.FindLease(t.Context(), running.Addr); !ok || l.Owner != "running" || l.Since == 0 || l.Prefix != prefix("10.0.0.0/24") || err != nil {
				t.Errorf("held is %+v, %v, %v", l, ok, err)
			}
			if asked != 2 {
				t.Errorf("links were listed %d times", asked)
			}
			if err := p.Adopt(t.Context(), []Lease{{Addr: addr("10.0.0.6"), Owner: "thief"}, {}}); err != nil {
				t.Fatal(err)
			}
			if l, _, _ := p.FindLease(t.Context(), addr("10.0.0.6")); l.Owner != "new" {
				t.Errorf("adopt gave it to %s", l.Owner)
			}
		})
	}
}

func TestNothingIsLentFromANewFileWhileLinksCannotBeListed(t *testing.T) {
	p := newPool(t, azure(nic(mac1, "10.0.0.0/24", 4)))
	boom := errors.New("no netlink")
	p.cfg.Links = func(context.Context) ([]Lease, error) { return nil, boom }
	_, err := p.Lease(t.Context(), Request{Owner: "o"})
	wants(t, err, boom)
}

func TestStatus(t *testing.T) {
	f := azure(nic(mac1, "10.0.0.0/24", 6))
	p := newPool(t, f)
	f.occupied.onHost = map[netip.Addr]string{addr("10.0.0.9"): "eth0"}
	a, b := p.must(t, Request{Owner: "a"}), p.must(t, Request{Owner: "b"})
	p.Release(t.Context(), "b", b.Addr)
	f.fail(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "oops", http.StatusForbidden) })
	f.pass(20 * time.Second)
	got, err := p.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range []string{"Metadata Security Protocol", "10.0.0.9"} {
		if !strings.Contains(strings.Join(got.Warnings, "\n"), w) {
			t.Errorf("no warning about %s: %q", w, got.Warnings)
		}
	}
	got.Warnings, got.Sources[0].Failure = nil, ""
	want := Status{
		Sources: []SourceStatus{{Name: "wireserver", Used: true, Answered: true, Age: 20 * time.Second}},
		NICs: []NICStatus{{MAC: mac1, Primary: true, Subnets: []SubnetStatus{{
			Prefix: prefix("10.0.0.0/24"), Primary: addr("10.0.0.4"),
			Hosted: map[netip.Addr]string{addr("10.0.0.9"): "eth0"}, RoutedBy: map[netip.Addr]string{},
			Census: Census{Configs: 6, Own: 1, Free: 2, Held: 1, Cooling: 1, OnHost: 1},
		}}}},
		Leases:  map[netip.Addr]Lease{a.Addr: a},
		Cooling: map[netip.Addr]time.Duration{b.Addr: 10 * time.Second},
		Now:     f.now,
	}
	if diff := cmp.Diff(want, got, compareAddr); diff != "" {
		t.Errorf("status (-want +got):\n%s", diff)
	}
}
