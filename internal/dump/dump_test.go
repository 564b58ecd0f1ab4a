// Copyright (c) The azure-vnet authors. MIT licence.

package dump

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"azurevnet/internal/vnetsim"
)

func TestAnInterruptedListingIsRepeatedAndOthersAreNot(t *testing.T) {
	other := errors.New("another")
	for _, c := range []struct {
		name     string
		patience time.Duration
		answers  []error
		want     error
		calls    int
	}{
		{"whole at once", time.Minute, []error{nil}, nil, 1},
		{"interrupted a hundred times", time.Minute, append(slices.Repeat([]error{netlink.ErrDumpInterrupted}, 100), nil), nil, 101},
		{"interrupted, as a library wraps it", time.Minute, []error{fmt.Errorf("list: %w", netlink.ErrDumpInterrupted), nil}, nil, 2},
		{"another error", time.Minute, []error{netlink.ErrDumpInterrupted, other, nil}, other, 2},
		{"interrupted for too long", 0, slices.Repeat([]error{netlink.ErrDumpInterrupted}, 9), netlink.ErrDumpInterrupted, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := repeatTime
			repeatTime = c.patience
			defer func() { repeatTime = before }()
			calls := 0
			all, err := Whole(func() ([]int, error) {
				calls++
				return []int{calls}, c.answers[calls-1]
			})
			if !errors.Is(err, c.want) || calls != c.calls || !slices.Equal(all, []int{calls}) {
				t.Errorf("%v %v after %d calls", all, err, calls)
			}
		})
	}
}

// TestListsAreWholeWhileLinksComeAndGo: what stands all the while is in every list, and no list fails.
func TestListsAreWholeWhileLinksComeAndGo(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make network namespaces")
	}
	err := vnetsim.InNewNamespace(func() {
		const stand = 100
		for i := range stand {
			pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprintf("a%d", i)}, PeerName: fmt.Sprintf("b%d", i)}
			if err := netlink.LinkAdd(pair); err != nil {
				t.Error(err)
				return
			}
		}
		defer comeAndGo(t)()
		interrupted := 0
		for range 20 {
			links, err := Whole(func() ([]netlink.Link, error) {
				links, err := netlink.LinkList()
				if err != nil {
					interrupted++
				}
				return links, err
			})
			standing := 0
			for _, l := range links {
				if name := l.Attrs().Name; name[0] == 'a' || name[0] == 'b' {
					standing++
				}
			}
			if err != nil || standing != 2*stand {
				t.Errorf("%d of %d links are listed: %v", standing, 2*stand, err)
			}
		}
		if interrupted == 0 {
			t.Error("no listing was interrupted: this test is blind")
		}
	})
	if err != nil {
		t.Error(err)
	}
}

// comeAndGo makes and deletes pairs of links in the namespace of the calling thread.
func comeAndGo(t *testing.T) (stop func()) {
	here, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	var all sync.WaitGroup
	for i := range 4 {
		all.Go(func() {
			runtime.LockOSThread()
			if err := netns.Set(here); err != nil {
				t.Error(err)
				return
			}
			for {
				select {
				case <-ended:
					return
				default:
				}
				pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprintf("x%d", i)}, PeerName: fmt.Sprintf("y%d", i)}
				if err := errors.Join(netlink.LinkAdd(pair), netlink.LinkDel(pair)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	return func() { close(ended); all.Wait(); here.Close() }
}
