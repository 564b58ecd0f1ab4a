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

// text is the policy in one spelling, whatever the order its prefixes came in.
func (p Policy) text() string {
	var words []string
	switch {
	case p.Internal:
		words = append(words, "internal")
	case !p.SNAT:
		words = append(words, "snat=off") // without SNAT nothing needs a list of what is reached without it
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

// id names the policy in aliases, chains and host.json.
func (p Policy) id() string {
	sum := sha256.Sum256([]byte(p.text()))
	return hex.EncodeToString(sum[:4])
}

// rulesetNetwork is the policy as the rules take it.
func (p Policy) rulesetNetwork() ruleset.Network {
	return ruleset.Network{ID: p.id(), SNAT: p.SNAT && !p.Internal, Direct: p.Direct}
}

// policyOf finds a policy by its id. host.json may be lost while links stand: the
// policies without a list are known by their ids alone, and any other is taken for the
// default.
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

// LearnPolicy writes down the policy of a network whose endpoints may stand already, and makes
// the rules what they need: should host.json have been lost, links tell the policy's id
// and no more. A policy that is known costs a read.
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
		return err // whose files are not ours to change
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

// maxUnusedPolicies is how many a host may know that no endpoint has. Each has its chain, so
// that the next container of its network is programmed by its elements alone.
const maxUnusedPolicies = 32

// recordPolicy writes a policy down. Where many are known, those that no link has are forgotten:
// a network without endpoints tells its policy again.
func (h *Host) recordPolicy(ctx context.Context, p Policy, links rtnl.Links) error {
	used := map[string]bool{}
	for _, l := range links {
		if a, ok := endpointAliasOf(l); ok {
			used[a.policy] = true
		}
	}
	err := h.updateState(ctx, "learn a policy", func(s *hostState) error {
		if len(s.Policies) >= maxUnusedPolicies {
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
