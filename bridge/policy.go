// Copyright (c) The azure-vnet authors. MIT licence.

package bridge

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"

	"azurevnet/bridge/internal/rtnl"
	"azurevnet/bridge/internal/ruleset"
)

// text spells the policy. Two policies that mean the same have the same text, in whatever order their prefixes
// are given.
func (p Policy) text() string {
	var words []string
	switch {
	case p.Internal:
		words = append(words, "internal")
	case !p.SNAT:
		words = append(words, "snat=off") // without SNAT, the list of direct prefixes has no effect
	case p.Direct == nil:
		words = append(words, "snat=on")
	default:
		var direct []string
		for _, d := range p.Direct {
			direct = append(direct, d.Masked().String())
		}
		slices.Sort(direct)
		words = append(words, "snat=on direct="+strings.Join(slices.Compact(direct), ","))
	}
	if p.NoMetadata {
		words = append(words, "metadata=off")
	}
	return strings.Join(words, " ")
}

// id names the policy in aliases, chains and host.json: eight hex digits of its text's hash.
func (p Policy) id() string {
	sum := sha256.Sum256([]byte(p.text()))
	return hex.EncodeToString(sum[:4])
}

// rulesetPolicy returns the policy as plain values for the nft tables.
func (p Policy) rulesetPolicy() ruleset.Policy {
	return ruleset.Policy{ID: p.id(), SNAT: p.SNAT && !p.Internal, Direct: p.Direct}
}

// policyOf finds a policy by its id. host.json may have been lost while links remain. Then policies without a
// list of prefixes are found by computing their ids, and any other is taken for the default.
func policyOf(known map[string]Policy, id string) Policy {
	if p, ok := known[id]; ok {
		return p
	}
	for _, p := range []Policy{{Internal: true}, {}, {SNAT: true}} {
		for _, p.NoMetadata = range []bool{false, true} {
			if p.id() == id {
				return p
			}
		}
	}
	return Policy{SNAT: true}
}

// LearnPolicy writes the policy of a network into host.json and brings the nft tables up to date. The network
// may have endpoints already: their aliases have only the policy's id, and host.json may have been lost. If
// host.json has the policy, LearnPolicy costs one read.
func (h *Host) LearnPolicy(ctx context.Context, p Policy) error {
	s, err := h.readState()
	if err != nil {
		return err
	}
	if _, known := s.Policies[p.id()]; known {
		return nil
	}
	unlock, err := h.lockHost(ctx, "learn a policy")
	if err != nil {
		return err
	}
	defer unlock()
	links, err := rtnl.ReadLinks()
	if err != nil {
		return err
	}
	if err := refuseFormer(links); err != nil {
		return err // an earlier build's files are not ours to change
	}
	if err := h.recordPolicy(ctx, p, links); err != nil {
		return err
	}
	v, err := h.readView()
	if err != nil || !v.state.isAsked() {
		return err
	}
	_, err = v.rulesetConfig().Sync()
	return err
}

// policiesBeforeForgetting is how many policies host.json has, used or not, when the next one that is written
// makes it forget those without an endpoint. Until then an unused policy keeps its chain in the nft tables, so
// that the next container of its network needs new elements only.
const policiesBeforeForgetting = 32

// recordPolicy writes a policy into host.json. If host.json has policiesBeforeForgetting, it forgets those that no link has. This
// loses nothing: a network without endpoints tells its policy again.
func (h *Host) recordPolicy(ctx context.Context, p Policy, links rtnl.Links) error {
	used := map[string]bool{}
	for _, l := range links {
		if a, ok := endpointAliasOf(l); ok {
			used[a.policy] = true
		}
	}
	err := h.updateState(ctx, "learn a policy", func(s *hostState) error {
		if len(s.Policies) >= policiesBeforeForgetting {
			maps.DeleteFunc(s.Policies, func(id string, _ Policy) bool { return !used[id] })
		}
		s.Policies[p.id()] = p
		return nil
	})
	if err != nil {
		return fmt.Errorf("write the policy down: %w", err)
	}
	return nil
}
