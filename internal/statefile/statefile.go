// Copyright (c) The azure-vnet authors. MIT licence.

// Package statefile is one Go value in one JSON file, shared by every process
// of the host. It is not a database: the file is read whole, changed by one
// process at a time and replaced whole by a rename, so a reader needs no lock
// and a process killed between any two lines leaves the old value or the new.
//
// Processes of several versions may share a file. What a program does not know
// in it survives the program's changes; see merge.go.
package statefile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	jsonv1 "github.com/go-json-experiment/json/v1"
)

var (
	// ErrUnreadable is in the error of a file that is there but is no such
	// value: empty, truncated, full of NULs, or refused by its Check. The file
	// is left as it is; SetAside moves it out of the way where that is wanted.
	ErrUnreadable = errors.New("unreadable state")

	// ErrUnchanged is returned by a change that has nothing to write. It ends the
	// update as a success.
	ErrUnchanged = errors.New("unchanged")
)

// Checker is a value that knows whether it can be used, such as by its version.
// An error makes the file ErrUnreadable. A missing file is not checked: it is
// the zero value.
type Checker interface{ Check() error }

// Read returns the value in the file, the zero value if there is none. It takes
// no lock.
func Read[T any](path string) (T, error) {
	v, _, err := loadFile[T](path)
	return v, err
}

// Update reads the value, lets change alter it, and writes it back if it came
// out different, all under the file's lock. The zero value is given to change
// if there is no file; missing directories are made. An error of change is
// returned as it is, and nothing is written. who says what the lock is held
// for: whoever waits too long for it is told. A process may be killed at any
// point: the lock goes with it and the file holds the old value or the new.
func Update[T any](ctx context.Context, path, who string, change func(*T) error) error {
	return updateFile(ctx, path, who, false, change)
}

// UpdateDurably is Update for a value that must outlive a power cut: when it returns,
// the file and its directory are on the disk.
func UpdateDurably[T any](ctx context.Context, path, who string, change func(*T) error) error {
	return updateFile(ctx, path, who, true, change)
}

func updateFile[T any](ctx context.Context, path, who string, durable bool, change func(*T) error) error {
	unlock, err := Lock(ctx, path+".lock", who)
	if err != nil {
		return err
	}
	defer unlock()
	v, old, err := loadFile[T](path)
	if err != nil {
		return err
	}
	var known []byte // what this program understood of old, if that was not all
	if old.foreign {
		if known, err = encodeValue(&v); err != nil {
			return fmt.Errorf("encode %s: %w", path, err)
		}
	}
	if err := change(&v); errors.Is(err, ErrUnchanged) {
		return nil
	} else if err != nil {
		return err
	}
	body, err := encodeValue(&v)
	if err != nil {
		return fmt.Errorf("encode %s: %w", path, err)
	}
	if old.foreign {
		if body, err = mergeUnknown(old.body, known, body); err != nil {
			return fmt.Errorf("keep what others wrote in %s: %w", path, err)
		}
	}
	if body = append(body, '\n'); bytes.Equal(body, old.body) {
		return nil
	}
	return replaceFile(path, body, durable)
}

// SetAside moves an unreadable file to <path>.bad-<time>, of which only the
// newest is kept, so that the next Update starts anew. It looks again under the
// lock: a file that can be read, or none, is left alone.
func SetAside[T any](ctx context.Context, path, who string) error {
	unlock, err := Lock(ctx, path+".lock", who)
	if err != nil {
		return err
	}
	defer unlock()
	if _, _, err := loadFile[T](path); !errors.Is(err, ErrUnreadable) {
		return err
	}
	before := ListAside(path)
	bad := path + ".bad-" + time.Now().UTC().Format("20060102T150405.000000000Z")
	if err := os.Rename(path, bad); err != nil {
		return fmt.Errorf("set %s aside: %w", path, err)
	}
	for _, b := range before {
		os.Remove(b) // a second copy harms nobody
	}
	return nil
}

// ListAside lists the unreadable files that were set aside.
func ListAside(path string) []string {
	entries, _ := os.ReadDir(filepath.Dir(path)) // no directory: nothing in it
	var bad []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), filepath.Base(path)+".bad-") {
			bad = append(bad, filepath.Join(filepath.Dir(path), e.Name()))
		}
	}
	return bad
}

// content is a file as it was read.
type content struct {
	body    []byte
	foreign bool // it holds keys that this program does not know
}

func loadFile[T any](path string) (v T, c content, err error) {
	body, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return v, content{}, nil
	} else if err != nil {
		return v, content{}, fmt.Errorf("read state: %w", err)
	}
	v, foreign, err := decodeValue[T](body)
	if err != nil {
		return v, content{}, fmt.Errorf("%w: %s: %w", ErrUnreadable, path, err)
	}
	return v, content{body, foreign}, nil
}

// decodeValue reads strictly first: when that succeeds, and it nearly always does,
// there is nothing in the file that merge would have to keep.
func decodeValue[T any](body []byte) (v T, foreign bool, err error) {
	if !decodeStrict(body, &v) {
		v, foreign = *new(T), true
		if err := decodeLenient(body, &v); err != nil {
			return *new(T), false, err
		}
	}
	if c, ok := any(&v).(Checker); ok {
		if err := c.Check(); err != nil {
			return *new(T), false, err
		}
	}
	return v, foreign, nil
}

// format spells a value in one way only, so that an update which changes nothing
// is known by its bytes. A nil slice comes back as nil: none is not an empty one.
var format = json.JoinOptions(json.Deterministic(true), json.FormatNilSliceAsNull(true), json.FormatNilMapAsNull(true), jsonv1.FormatDurationAsNano(true), jsonv1.OmitEmptyWithLegacySemantics(true),
	jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true))

func encodeValue(v any) ([]byte, error) { return json.Marshal(v, format) }

func decodeStrict(body []byte, v any) bool {
	return json.Unmarshal(body, v, format, json.RejectUnknownMembers(true)) == nil && !isNull(body)
}

func decodeLenient(body []byte, v any) error {
	switch {
	case len(bytes.TrimSpace(body)) == 0:
		return errors.New("it is empty")
	case isNull(body):
		return errors.New("it holds null")
	}
	return json.Unmarshal(body, v, format)
}

func isNull(body []byte) bool { return string(bytes.TrimSpace(body)) == "null" }

// replaceFile writes a temporary file and renames it over path. The name is fixed:
// the lock is held, and what a killed writer left is overwritten. On failure
// the old file stands.
func replaceFile(path string, body []byte, durable bool) (err error) {
	tmp := path + ".tmp"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	_, err = f.Write(body)
	if err == nil && durable {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		os.Remove(tmp) // it may be what filled the disk
		return fmt.Errorf("write state, %s is as it was: %w", path, err)
	}
	if durable {
		return syncDir(filepath.Dir(path))
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync state: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("sync state: %w", err)
	}
	return nil
}
