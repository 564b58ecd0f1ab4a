// Copyright (c) The azure-vnet authors. MIT licence.

// Package cni is the Container Network Interface as both of our plugins speak
// it: a call with its configuration, its owner and its addresses, one document
// for an answer, and one line in the log. It is not a plugin: what a verb does
// is in package main of each.
//
// A call is read by package skel of the CNI project and answered here, once: a
// panic, a bad environment and a bad configuration are error documents too.
package cni

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"
)

// Plugin is what a plugin does for each verb. VERSION needs none.
type Plugin struct {
	Name    string // of the binary
	Version string // of the release
	Main    bool   // a main plugin, whose configuration has more than the part for IPAM

	Add    func(context.Context, *Call) (*current.Result, error)
	Del    func(context.Context, *Call) error
	Check  func(context.Context, *Call) error
	GC     func(context.Context, *Call) error
	Status func(context.Context, *Call) error
}

// Call is one call of a plugin.
type Call struct {
	Verb        string
	ContainerID string
	Netns       string // path of the container's network namespace; may be empty with DEL
	IfName      string // in that namespace
	Pod         string // namespace/name, where the runtime tells
	Stdin       []byte // the configuration as it came: what a delegated plugin is given
	Conf        Conf

	attach bool  // it is the word attach or detach that calls, and no runtime: see AttachArg
	notes  []any // for the log: keys and values
}

// deadline bounds a call. CRI-O kills a plugin after 60 s. Undoing a failed ADD comes on
// top of the deadline: undoTime, 10 s, for the link and the lease.
const deadline = 30 * time.Second

// Main serves the call that this process was started for, and ends the process.
func Main(p Plugin) {
	runtime.GOMAXPROCS(1) // nothing here runs side by side: an eighth of the CPU is saved
	os.Exit(p.serve(os.Stdout))
}

// serve writes at most one document, at its very end, and returns the exit code.
func (p Plugin) serve(out io.Writer) int {
	start := time.Now()
	// skel reads the same values. But if skel refuses the call, it hands none of them on, and the log needs them.
	said, _ := parseArgs(os.Getenv("CNI_ARGS")) // as far as it can be read
	call := &Call{
		Verb: os.Getenv("CNI_COMMAND"), ContainerID: os.Getenv("CNI_CONTAINERID"), Netns: os.Getenv("CNI_NETNS"), IfName: os.Getenv("CNI_IFNAME"), Pod: podOf(said),
	}
	answer, err := p.answer(call)
	code := 0
	if err != nil {
		answer, code = call.errorDocument(err), 1
	}
	if len(answer) > 0 {
		if _, bad := out.Write(append(answer, '\n')); bad != nil && err == nil {
			err, code = bad, 1
		}
	}
	call.log(p, start, err)
	return code
}

// answer lets skel read the call, and keeps the result until skel is content.
func (p Plugin) answer(call *Call) (document []byte, err error) {
	defer func() {
		if r := recover(); r != nil {
			call.Note("stack", string(debug.Stack()))
			err = fmt.Errorf("%s panicked, which is a mistake in it: %v", p.Name, r)
		}
	}()
	if call.Verb == "" {
		fmt.Fprintf(os.Stderr, "%s %s is a CNI plugin: a container runtime calls it.\n", p.Name, p.Version)
	} else if err := call.listen(); err != nil {
		return nil, err
	}
	// skel compares the container's namespace with ours when the work is done,
	// and fails a DEL for ever whose namespace is gone in an odd way. The bridge
	// compares before it does anything.
	if err := os.Setenv("CNI_NETNS_OVERRIDE", "1"); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	with := func(do func(context.Context, *Call) error) func(*skel.CmdArgs) error {
		return func(args *skel.CmdArgs) error {
			err := call.read(args, p.Main)
			if err == nil {
				err = call.serve(ctx, p.Name, do)
			}
			if err != nil {
				return call.toError(err) // skel would give it a code of its own
			}
			return nil
		}
	}
	funcs := skel.CNIFuncs{
		Add: with(func(ctx context.Context, c *Call) error {
			result, err := p.Add(ctx, c)
			if err == nil {
				document, err = c.document(result)
			}
			return err
		}),
		Del: with(p.Del), Check: with(p.Check), GC: with(p.GC), Status: with(p.Status),
	}
	if e := skel.PluginMainFuncsWithError(funcs, version.All, ""); e != nil {
		return nil, e
	}
	return document, nil
}

// serve does what the verb says. ADD and DEL of one interface come one after the other. STATUS
// tries whether it may write in the directory that ADD and DEL write in.
func (c *Call) serve(ctx context.Context, plugin string, do func(context.Context, *Call) error) error {
	if c.Verb == "STATUS" {
		if err := tryState(plugin); err != nil {
			return err
		}
	}
	if c.Verb == "ADD" || c.Verb == "DEL" {
		unlock, err := c.lockOwner(ctx, plugin)
		if err != nil {
			return err
		}
		defer unlock()
	}
	return do(ctx, c)
}

// Bounds of the configuration on stdin.
const (
	stdinMost = 1 << 20          // bytes. A list of a few hundred attachments, which GC has, is some 30 KB
	stdinTime = 10 * time.Second // a runtime that does not end what it writes
)

// readStdin reads the configuration.
func readStdin() ([]byte, error) {
	type read struct {
		conf []byte
		err  error
	}
	done := make(chan read, 1)
	go func() {
		conf, err := io.ReadAll(io.LimitReader(os.Stdin, stdinMost+1))
		done <- read{conf, err}
	}()
	select {
	case r := <-done:
		switch {
		case r.err != nil:
			return nil, wrong(types.ErrIOFailure, "read the network configuration: %v", r.err)
		case len(r.conf) > stdinMost:
			return nil, wrong(types.ErrInvalidNetworkConfig, "the network configuration on stdin is longer than %d bytes", stdinMost)
		}
		return r.conf, nil
	case <-time.After(stdinTime):
		return nil, wrong(types.ErrIOFailure, "the network configuration on stdin does not end within %v: the runtime must close its end", stdinTime)
	}
}

// listen reads the configuration before skel does, which may refuse the call
// without a word of it: an error answers in its version too. VERSION has none,
// and no verb is a person at a terminal.
func (c *Call) listen() error {
	if c.Verb == "VERSION" {
		return nil
	}
	conf, err := readStdin()
	if err != nil {
		return err
	}
	c.Stdin, c.Conf = conf, readName(conf)
	fd, err := unix.MemfdCreate("stdin", unix.MFD_CLOEXEC) // a pipe would want a reader, and skel may be none
	if err != nil {
		return fmt.Errorf("hand the network configuration on: %w", err)
	}
	copied := os.NewFile(uintptr(fd), "stdin")
	if _, err = copied.Write(conf); err == nil {
		_, err = copied.Seek(0, io.SeekStart)
	}
	if err != nil {
		return fmt.Errorf("hand the network configuration on: %w", err)
	}
	os.Stdin = copied
	return nil
}

// read takes what skel has read, and reads the configuration.
func (c *Call) read(args *skel.CmdArgs, main bool) (err error) {
	c.ContainerID, c.Netns, c.IfName, c.Stdin = args.ContainerID, args.Netns, args.IfName, args.StdinData
	c.attach = slices.Contains(strings.Split(args.Args, ";"), AttachArg[0]+"="+AttachArg[1])
	if c.Verb == "DEL" {
		// A name is enough to take away what there is: a configuration that
		// became wrong since must not keep a pod from ending.
		c.Conf = readName(c.Stdin)
		return nil
	}
	c.Conf, err = readConf(c.Stdin, args.Args, main)
	return err
}

// document is the result as the configuration's version has it.
func (c *Call) document(r *current.Result) ([]byte, error) {
	converted, err := r.GetAsVersion(c.Conf.CNIVersion)
	if err != nil {
		return nil, fmt.Errorf("word the result as CNI %s: %w", c.Conf.CNIVersion, err)
	}
	return json.Marshal(converted)
}

// errorDocument is an error as the specification has it.
func (c *Call) errorDocument(err error) []byte {
	e := c.toError(err)
	text, _ := json.Marshal(struct { // strings and a number never fail
		CNIVersion string `json:"cniVersion"`
		*types.Error
	}{c.version(), e})
	return text
}

// version is the configuration's, or ours where that says nothing of use.
func (c *Call) version() string {
	v := c.Conf.CNIVersion
	for _, known := range version.All.SupportedVersions() {
		if v == known {
			return v
		}
	}
	return version.Current()
}

// Note has the call's line in the log say key=value.
func (c *Call) Note(key string, value any) { c.notes = append(c.notes, key, value) }
