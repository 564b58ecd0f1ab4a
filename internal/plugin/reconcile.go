// Copyright (c) The azure-vnet authors. MIT licence.

package plugin

import (
	"context"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"azurevnet/bridge"
	"azurevnet/driver"
	"azurevnet/internal/upkeep"
	"azurevnet/pool"
)

const (
	reconcileEvery = 30 * time.Second       // the plugin reconciles this often without any event
	reconcileDelay = 500 * time.Millisecond // it reconciles this long after an event, since events come in bunches
	reconcileTime  = 60 * time.Second       // bounds one run of reconcileOnce
	watchWait      = 5 * time.Second        // before a watch that ended begins again
)

// reconciler reconciles in the background: at the plugin's start, on events of the kernel, and every 30 s. One of its parts
// is a round of package bridge.
type reconciler struct {
	log      *logrus.Logger
	host     *bridge.Host
	pool     *pool.Pool
	networks *driver.Driver
	reclaim  bool // the setting RECLAIM

	mu       sync.Mutex            // guards failures
	failures map[string]failureRow // by the part of reconcileOnce that fails: see logFailure
}

// start restores the networks in the background, calls restored, and then reconciles until end is called. end waits
// for the part that runs, 1 s at most, because a disk may hang.
func (r *reconciler) start(ctx context.Context, p places, restored func(context.Context)) (end func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer lockPlugin(ctx, r.log, p)()
		r.logFailure(ctx, "restore networks", r.networks.Restore(ctx))
		restored(ctx)
		r.reconcileUntilDone(ctx)
	}()
	return func() {
		cancel()
		select {
		case <-done:
		case <-time.After(time.Second):
		}
	}
}

// reconcileUntilDone reconciles again and again until ctx is done.
func (r *reconciler) reconcileUntilDone(ctx context.Context) {
	events := make(chan struct{}, 1)
	go r.watchKernel(ctx, events)
	tick := time.NewTicker(reconcileEvery)
	defer tick.Stop()
	for {
		r.reconcileOnce(ctx)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-events:
			select {
			case <-ctx.Done():
			case <-time.After(reconcileDelay):
			}
			select {
			case <-events:
			default:
			}
		}
	}
}

// watchKernel sends to events when the kernel reports a change. The channel has room for one event, so a bunch of
// changes causes one run of reconcileOnce.
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

// checkNIC names a part of reconcileOnce in the log: the check whether a NIC is a port of a bridge of somebody else.
const checkNIC = "look at the NIC"

// reconcileOnce does each part once. If a part fails, the parts after it are done all the same. Restore comes
// last, because each network whose NIC is gone may take 15 s.
func (r *reconciler) reconcileOnce(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, reconcileTime)
	defer cancel()
	r.logFailure(ctx, "reconcile the host", r.mendHost(ctx))
	r.logFailure(ctx, "collect leaked leases", r.collectLeases(ctx))
	r.logFailure(ctx, "hold published ports", r.networks.BindPorts(ctx)) // collectLeases has removed links that no container took
	r.logFailure(ctx, "collect auxiliary addresses", r.collectAux(ctx))
	nics, err := r.pool.NICs(ctx) // a lease does not wait for a slow source, so the sources are asked here too, and with more time
	r.logFailure(ctx, checkNIC, r.host.CheckReady(ctx, primaryOf(nics)...))
	r.logFailure(ctx, "ask for addresses", err)
	if err == nil && r.reclaim {
		r.logFailure(ctx, "reclaim addresses", r.reclaimAll(ctx, nics))
	}
	r.logFailure(ctx, "restore networks", r.networks.Restore(ctx))
}

// mendHost has package bridge mend what is not as it should be.
func (r *reconciler) mendHost(ctx context.Context) error {
	mended, err := r.host.Reconcile(ctx)
	for _, what := range mended {
		r.log.WithField("what", what).Warn("mended")
	}
	return err
}

// primaryOf returns the MAC of the primary NIC, and none if the primary NIC is not known. CheckReady need not look at the
// other NICs: Restore does, if networks use them.
func primaryOf(nics []pool.NIC) (macs []string) {
	for _, nic := range nics {
		if nic.Primary {
			macs = append(macs, nic.MAC)
		}
	}
	return macs
}

// collectLeases ends leases without a container. It leases again the addresses of running containers that have no
// lease. It removes links that were never moved into a container.
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

// collectLinks removes the links of Docker's that are in no container and have no lease.
func (r *reconciler) collectLinks(ctx context.Context) error {
	all, err := r.host.Attachments(ctx)
	if err != nil {
		return err
	}
	for _, link := range all {
		if link.InContainer || !strings.HasPrefix(link.Owner, driver.OwnerPrefix) {
			continue
		}
		if lease, held, err := r.pool.FindLease(ctx, link.Addr.Addr()); err != nil {
			return err
		} else if held && lease.Owner == link.Lease {
			continue // the engine is about to move it into a container, or its lease is too young to have leaked
		}
		if err := r.host.Detach(ctx, link.Owner); err != nil {
			return err
		}
		r.log.WithFields(logrus.Fields{"address": link.Addr.Addr(), "owner": link.Owner, "link": link.Link}).Warn("removed a link that no container had any more")
	}
	return nil
}

// leaseFields returns what a line of the log says of a lease.
func leaseFields(lease pool.Lease) logrus.Fields {
	fields := logrus.Fields{"address": lease.Addr, "owner": lease.Owner}
	if lease.Pod != "" {
		fields["pod"] = lease.Pod
	}
	return fields
}

// collectAux releases the auxiliary addresses that no network has any more.
func (r *reconciler) collectAux(ctx context.Context) error {
	released, err := r.networks.CollectAux(ctx)
	for _, lease := range released {
		r.log.WithFields(leaseFields(lease)).Warn("released an auxiliary address that no network has")
	}
	return err
}

// reclaimRemedy returns the words about RECLAIM in errors, for an address that the host's NIC has. on is the setting.
func reclaimRemedy(on bool) string {
	if on {
		return "RECLAIM=on takes them back within 30 s"
	}
	return "docker plugin disable -f azure-vnet:latest && docker plugin set azure-vnet:latest RECLAIM=on && docker plugin enable azure-vnet:latest"
}

// reclaimAll takes secondary addresses off the host's NICs, where the host would answer in the place of a container.
func (r *reconciler) reclaimAll(ctx context.Context, nics []pool.NIC) error {
	return upkeep.Reclaim(ctx, r.host, nics, func(nic string, addrs []netip.Addr) {
		r.log.WithFields(logrus.Fields{"nic": nic, "addresses": addrs}).Warn("took secondary addresses off the host")
	})
}
