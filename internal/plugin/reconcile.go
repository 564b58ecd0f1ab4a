// Copyright (c) The azure-vnet authors. MIT licence.

package plugin

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"azurevnet/bridge"
	"azurevnet/driver"
	"azurevnet/internal/failure"
	"azurevnet/internal/upkeep"
	"azurevnet/pool"
)

const (
	mendEvery = 30 * time.Second       // without any event
	mendQuiet = 500 * time.Millisecond // events that come in a bunch are one
	mendTime  = 60 * time.Second       // bounds one round
	watchWait = 5 * time.Second        // before a watch that ended is begun again
)

// reconciler makes the host what it should be, on the kernel's events and now and then.
type reconciler struct {
	log      *logrus.Logger
	host     *bridge.Host
	pool     *pool.Pool
	networks *driver.Driver
	reclaim  bool

	mu       sync.Mutex            // guards said
	failures map[string]failureRow // by what failed, so that a lasting failure is told once
}

// start restores the networks in the background, calls restored, and then mends until end is called. end waits one second
// at most, because a disk may hang.
func (r *reconciler) start(ctx context.Context, p places, restored func(context.Context)) (end func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer lockPlugin(ctx, r.log, p)()
		r.logFailure(ctx, "restore networks", r.networks.Restore(ctx))
		restored(ctx)
		r.runRounds(ctx)
	}()
	return func() {
		cancel()
		select {
		case <-done:
		case <-time.After(time.Second):
		}
	}
}

// runRounds mends until ctx is done.
func (r *reconciler) runRounds(ctx context.Context) {
	events := make(chan struct{}, 1)
	go r.watchKernel(ctx, events)
	tick := time.NewTicker(mendEvery)
	defer tick.Stop()
	for {
		r.runRound(ctx)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-events:
			select {
			case <-ctx.Done():
			case <-time.After(mendQuiet):
			}
			select {
			case <-events:
			default:
			}
		}
	}
}

// watchKernel turns the kernel's events into one that is waiting to be taken.
func (r *reconciler) watchKernel(ctx context.Context, events chan<- struct{}) {
	for ctx.Err() == nil {
		err := r.host.Watch(ctx, func() {
			select {
			case events <- struct{}{}:
			default:
			}
		})
		if ctx.Err() == nil {
			r.logFailure(ctx, "watch the kernel", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(watchWait):
		}
	}
}

// checkNIC names the look for a NIC that somebody else's bridge has.
const checkNIC = "look at the NIC"

// runRound is one round. Each part stands alone: a part that fails keeps no other part
// from being done. Restore comes last, for each network whose NIC is gone may take up
// to 15 s of the round.
func (r *reconciler) runRound(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, mendTime)
	defer cancel()
	mended, err := r.host.Reconcile(ctx)
	for _, what := range mended {
		r.log.WithField("what", what).Warn("mended")
	}
	r.logFailure(ctx, "reconcile the host", err)
	r.logFailure(ctx, "collect leaked leases", r.collectLeases(ctx))
	r.logFailure(ctx, "hold published ports", r.networks.BindPorts(ctx)) // after links that nobody took are gone
	r.logFailure(ctx, "collect auxiliary addresses", r.collectAux(ctx))
	// Asked here too, and with patience, for a lease does not wait for a slow source.
	nics, err := r.pool.NICs(ctx)
	r.logFailure(ctx, checkNIC, r.host.CheckReady(ctx, primaryOf(nics)...))
	if r.logFailure(ctx, "ask for addresses", err); err == nil && r.reclaim {
		r.logFailure(ctx, "reclaim addresses", r.reclaimAll(ctx, nics))
	}
	r.logFailure(ctx, "restore networks", r.networks.Restore(ctx))
}

// primaryOf is the MAC of the primary NIC; none: it is not known. Restore looks at the
// other NICs, as far as networks use them.
func primaryOf(nics []pool.NIC) (macs []string) {
	for _, nic := range nics {
		if nic.Primary {
			macs = append(macs, nic.MAC)
		}
	}
	return macs
}

// collectLeases makes the leases agree with the links of containers.
func (r *reconciler) collectLeases(ctx context.Context) error {
	released, err := upkeep.ReleaseLeaked(ctx, r.host, r.pool)
	for _, lease := range released {
		r.log.WithFields(leaseFields(lease)).Warn("released a lease that no container had any more")
	}
	if err != nil {
		return err
	}
	adopted, err := upkeep.AdoptLost(ctx, r.host, r.pool)
	for _, lease := range adopted {
		r.log.WithFields(leaseFields(lease)).Warn("leased again an address that a running container has")
	}
	if err != nil {
		return err
	}
	return r.collectLinks(ctx)
}

// collectLinks removes Docker's links that no container has and no lease speaks for.
func (r *reconciler) collectLinks(ctx context.Context) error {
	all, err := r.host.Attachments(ctx)
	if err != nil {
		return err
	}
	for _, at := range all {
		if at.InContainer || !strings.HasPrefix(at.Owner, driver.OwnerPrefix) {
			continue
		}
		if lease, held, err := r.pool.FindLease(ctx, at.Addr.Addr()); err != nil {
			return err
		} else if held && lease.Owner == at.Lease {
			continue // on its way into a container, or not old enough
		}
		if err := r.host.Detach(ctx, at.Owner); err != nil {
			return err
		}
		r.log.WithFields(logrus.Fields{"address": at.Addr.Addr(), "owner": at.Owner, "link": at.Link}).Warn("removed a link that no container had any more")
	}
	return nil
}

// leaseFields are what a line of the log says of a lease.
func leaseFields(lease pool.Lease) logrus.Fields {
	fields := logrus.Fields{"address": lease.Addr, "owner": lease.Owner}
	if lease.Pod != "" {
		fields["pod"] = lease.Pod
	}
	return fields
}

// collectAux releases the auxiliary addresses of networks that are no more.
func (r *reconciler) collectAux(ctx context.Context) error {
	released, err := r.networks.CollectAux(ctx)
	for _, lease := range released {
		r.log.WithFields(leaseFields(lease)).Warn("released an auxiliary address that no network has")
	}
	return err
}

// reclaimRemedy words for Docker's users what helps while the host holds secondary addresses.
func reclaimRemedy(on bool) string {
	if on {
		return "RECLAIM=on takes them back within 30 s"
	}
	return "docker plugin disable -f azure-vnet:latest && docker plugin set azure-vnet:latest RECLAIM=on && docker plugin enable azure-vnet:latest"
}

// reclaimAll takes secondary addresses off the host's NICs, where they would be
// answered by the host.
func (r *reconciler) reclaimAll(ctx context.Context, nics []pool.NIC) error {
	return upkeep.Reclaim(ctx, r.host, nics, func(nic string, addrs []netip.Addr) {
		r.log.WithFields(logrus.Fields{"nic": nic, "addresses": addrs}).Warn("took secondary addresses off the host")
	})
}

// failureRow is a failure that came again and again.
type failureRow struct {
	text  string // as it was told
	since time.Time
	times int
}

// isRepeatedBy reports whether text is the row's failure again. Ports, ages and counts in it may differ.
func (w failureRow) isRepeatedBy(text string) bool {
	return failure.Reason(w.text) == failure.Reason(text)
}

// logFailure logs an error when it comes, changes and goes, and not at every round. When the error goes or
// changes, tell logs how often it came. An error that the plugin's own stop causes is no failure.
func (r *reconciler) logFailure(ctx context.Context, what string, err error) {
	if err != nil && errors.Is(ctx.Err(), context.Canceled) {
		r.log.WithField("what", what).WithError(err).Debug("broken off: the plugin stops")
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.failures == nil {
		r.failures = map[string]failureRow{}
	}
	before, failed := r.failures[what]
	text := ""
	if err != nil {
		text = strings.ReplaceAll(err.Error(), "\n", "; ")
	}
	if failed && err != nil && before.isRepeatedBy(text) {
		before.times++
		r.failures[what] = before
		return
	}
	if failed {
		now := map[bool]string{true: "works again", false: "fails in another way now"}[err == nil]
		r.log.WithFields(logrus.Fields{"what": what, "times": before.times, "since": before.since.Format(time.RFC3339)}).Info(now)
		delete(r.failures, what)
	}
	if err != nil {
		r.log.WithField("what", what).Error(text)
		r.failures[what] = failureRow{text: text, since: time.Now(), times: 1}
	}
}
