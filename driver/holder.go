// Copyright (c) The azure-vnet authors. MIT licence.

package driver

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"azurevnet/bridge"
	"azurevnet/pool"
)

// Engine tells the names of containers and networks, of which this driver knows only the ids. The driver asks for a name
// to word an error, while the engine waits for the driver's answer. An engine that waits may answer nobody. So each
// method must give up soon.
type Engine interface {
	// Container returns the name of the container that has the endpoint, and that of the endpoint's network.
	Container(ctx context.Context, endpoint string) (container, network string, err error)
	// Network returns the name of a network.
	Network(ctx context.Context, id string) (string, error)
}

// WhoHas says in Docker's words who has a leased address. The text goes on after the address: "is held by …" or "is …".
func (d *Driver) WhoHas(ctx context.Context, l pool.Lease) string {
	if !strings.HasPrefix(l.Owner, OwnerPrefix) {
		return "is held by " + d.nameOwner(ctx, l.Owner)
	}
	if aux := d.describeAux(ctx, Aux{Addr: l.Addr, Owner: l.Owner}.same); aux != "" {
		return "is " + aux
	}
	all, _ := d.cfg.Host.Attachments(ctx) // if they cannot be read, the container is not known
	for _, attached := range all {
		if attached.Addr.Addr() == l.Addr {
			return "is held by " + d.nameOwner(ctx, attached.Owner)
		}
	}
	return "is held by a container or a network of Docker that is being made or removed just now"
}

// nameOwner names the container that has the owner: by Docker's name if it is Docker's, by its id if it is CNI's.
func (d *Driver) nameOwner(ctx context.Context, owner string) string {
	if endpoint, ok := strings.CutPrefix(owner, OwnerPrefix); ok {
		if d.cfg.Engine != nil {
			if container, network, err := d.cfg.Engine.Container(ctx, endpoint); err == nil {
				return fmt.Sprintf("container %s of network %s", container, network)
			}
		}
		return fmt.Sprintf("the container whose EndpointID in docker network inspect is %.12s…", endpoint)
	}
	if part := strings.Split(owner, "/"); len(part) == 4 { // <kind>/<network>/<containerID>/<ifname>
		return fmt.Sprintf("CNI container %s (interface %s, network %s)", part[2], part[3], part[1])
	}
	return owner
}

// describeAux names the auxiliary address for which meant is true, as in "auxiliary address NAME of network NET". It
// returns "" if no network has such an address.
func (d *Driver) describeAux(ctx context.Context, meant func(Aux) bool) string {
	file, _ := d.readNetworks() // if it cannot be read, no auxiliary address is known
	for id, n := range file.Networks {
		if i := slices.IndexFunc(n.Aux, meant); i >= 0 {
			return n.Aux[i].describe(d.networkName(ctx, id))
		}
	}
	return ""
}

// describe names the auxiliary address. network is the name of the network that has it.
func (a Aux) describe(network string) string {
	if a.Name == "" { // earlier releases did not keep the name
		return "an auxiliary address of network " + network
	}
	return fmt.Sprintf("auxiliary address %.40s of network %s", a.Name, network)
}

// networkName returns the engine's name of a network. If the engine does not answer, it returns the beginning of the id.
func (d *Driver) networkName(ctx context.Context, id string) string {
	if d.cfg.Engine != nil {
		if name, err := d.cfg.Engine.Network(ctx, id); err == nil {
			return name
		}
	}
	return fmt.Sprintf("%.12s", id)
}

// inDockersWords replaces the owners in the text of err, which mean nothing to a Docker user. err is the error of a call
// for the endpoint. Its text may name this endpoint, and another endpoint that has the address, the MAC or the port.
// The result wraps err.
func (d *Driver) inDockersWords(ctx context.Context, endpoint string, err error) error {
	if err == nil {
		return nil
	}
	text := replaceOwner(err.Error(), OwnerPrefix+endpoint, "the endpoint")
	var held *bridge.InUseError
	if errors.As(err, &held) && held.Owner != "" {
		text = replaceOwner(text, held.Owner, d.nameOwner(ctx, held.Owner))
	}
	if text == err.Error() {
		return err
	}
	return &wordedError{text, err}
}

// wordedError is an error with another text.
type wordedError struct {
	text string
	err  error
}

func (e *wordedError) Error() string { return e.text }

func (e *wordedError) Unwrap() error { return e.err }

// replaceOwner replaces an owner in a text by a name. It leaves a longer owner that only has the owner in it, such as
// docker/abcd for docker/ab.
func replaceOwner(text, owner, name string) string {
	var b strings.Builder
	for {
		before, after, found := strings.Cut(text, owner)
		b.WriteString(before)
		if !found {
			return b.String()
		}
		last, _ := utf8.DecodeLastRuneInString(before)
		next, _ := utf8.DecodeRuneInString(after)
		if mayBeInOwner(last) || mayBeInOwner(next) {
			b.WriteString(owner)
		} else {
			b.WriteString(name)
		}
		text = after
	}
}

// mayBeInOwner reports whether an owner may go on with r. A colon or a full stop after an owner ends it.
func mayBeInOwner(r rune) bool {
	return unicode.IsLetter(r) || unicode.IsDigit(r) || strings.ContainsRune("/-_", r)
}
