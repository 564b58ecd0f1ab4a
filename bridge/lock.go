// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/gofrs/flock"
)

// lockWait bounds the wait for the bridge's lock, below any deadline of a call
// that waits for it; lockPoll is how often it is tried meanwhile.
const (
	lockWait = 15 * time.Second
	lockPoll = 3 * time.Millisecond
)

// lockShared holds the bridge as it stands: for attach and detach. who is
// written into the lock file and named by whoever waits in vain.
func (h *Host) lockShared(ctx context.Context, who string) (unlock func(), err error) {
	return h.lock(ctx, who, (*flock.Flock).TryRLockContext)
}

// lockExclusive holds the bridge alone: for a move, a rebuild, a removal.
func (h *Host) lockExclusive(ctx context.Context, who string) (unlock func(), err error) {
	return h.lock(ctx, who, (*flock.Flock).TryLockContext)
}

// lock waits by polling, for flock(2) itself has no deadline. The kernel lets
// go of the lock with its holder's last descriptor, so a dead holder keeps nobody.
func (h *Host) lock(ctx context.Context, who string, try func(*flock.Flock, context.Context, time.Duration) (bool, error)) (func(), error) {
	if err := os.MkdirAll(h.path(), 0o755); err != nil {
		return nil, fmt.Errorf("lock the bridge: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	l := flock.New(h.path("bridge.lock"), flock.SetPermissions(0o600))
	if _, err := try(l, ctx, lockPoll); err != nil {
		l.Close()
		if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
			holder, _ := os.ReadFile(l.Path())
			return nil, fmt.Errorf("lock the bridge for %q: %q holds %s: %w", who, strings.TrimSpace(string(holder)), l.Path(), err)
		}
		return nil, fmt.Errorf("lock the bridge for %q: %w", who, err)
	}
	// Only words for people: of several shared holders the last one is named.
	_ = os.WriteFile(l.Path(), []byte(who+"\n"), 0o600)
	return func() { l.Close() }, nil
}
