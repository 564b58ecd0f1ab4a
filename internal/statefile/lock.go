// Copyright (c) The azure-vnet authors. MIT licence.

package statefile

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/gofrs/flock"
)

const (
	patience = 10 * time.Second     // longest wait for a lock when ctx has no deadline
	again    = 5 * time.Millisecond // between two tries: a holder is done in about one
)

// Lock takes the lock file at path, made with its directory if missing, and
// returns what gives it back. It waits until ctx is done, at most 10 s if ctx
// has no deadline; the error then names the holder, which is what it passed as
// who: a pid would mean nothing in another pid namespace. The kernel frees the
// lock of a process that dies.
func Lock(ctx context.Context, path, who string) (unlock func(), err error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, patience)
		defer cancel()
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	tick := time.NewTicker(again)
	defer tick.Stop()
	for {
		unlock, ok, err := TryLock(path, who)
		if ok || err != nil {
			return unlock, err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("lock %s, which is held for %q: %w", path, holder(path), context.Cause(ctx))
		}
	}
}

// TryLock is Lock without the wait: false if another holds the lock.
func TryLock(path, who string) (unlock func(), ok bool, err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, false, fmt.Errorf("lock %s: %w", path, err)
	}
	l := flock.New(path, flock.SetFlag(os.O_CREATE|os.O_RDWR), flock.SetPermissions(0o600))
	if ok, err := l.TryLock(); err != nil {
		return nil, false, fmt.Errorf("lock %s: %w", path, err)
	} else if !ok || !current(l) {
		l.Close()
		return nil, false, nil
	}
	// A full disk may refuse the name; the lock holds all the same.
	_ = os.WriteFile(path, []byte(who), 0o600)
	return func() { l.Close() }, true, nil
}

// current says that the lock is on the file that others will open, and not on
// one that was deleted in between.
func current(l *flock.Flock) bool {
	mine, err := l.Stat()
	if err != nil {
		return false
	}
	there, err := os.Stat(l.Path())
	return err == nil && os.SameFile(mine, there)
}

// holder is best effort: the name is written just after the lock is taken.
func holder(path string) string {
	who, _ := os.ReadFile(path)
	return strings.TrimSpace(string(who))
}
