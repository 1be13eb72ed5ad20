package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/daemon/api"
)

func (a *app) peerCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "peer",
		Short: "Let phones and other machines join with the official WireGuard program",
		Long: `Peer manages standard WireGuard peers of a session: a phone, a Mac or a Windows
machine that joins the cluster's network with the official WireGuard program,
where UDP port 51820 of the agent can be reached. A peer reaches what the session reaches,
but no other peer and not this machine. It lives as long as the agent's pod.`,
		Example: examples(a.name, `
culvert peer add phone --qr
culvert peer list
culvert peer remove phone`),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.peerAddCommand(), a.peerListCommand(), a.peerRemoveCommand())
	return cmd
}

func (a *app) peerAddCommand() *cobra.Command {
	var req api.PeerRequest
	var qr bool
	cmd := &cobra.Command{
		Use:   "add NAME",
		Short: "Add a peer and print its configuration",
		Long: `Add prints a configuration for wg-quick(8) and the official WireGuard programs.
Its private key is made now, printed once and kept nowhere; with --public-key the
peer keeps its own. The endpoint is the address of the agent's pod unless
--nodeport has a Service lead to it, or --endpoint says by which other address the
peer reaches UDP port 51820 there.`,
		Example: examples(a.name, `
culvert peer add phone --qr
culvert peer add mac > mac.conf
culvert peer add phone --nodeport --qr
culvert peer add phone --endpoint vpn.example.com:31820 --qr
culvert peer add server --public-key "$(wg pubkey < private.key)"
culvert peer add phone -o json`),
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			if qr && a.json() {
				return usageErrorf("leave one of them out", "--qr and --output json exclude each other")
			}
			if qr && req.PublicKey != "" {
				return usageErrorf("leave one of them out", "--qr and --public-key exclude each other: the code would have no private key")
			}
			req.Context, req.Name = a.context, args[0]
			return a.addPeer(cmd.Context(), req, qr)
		},
	}
	cmd.Flags().StringVar(&req.PublicKey, "public-key", "", "the peer's own public key; no private key is made")
	cmd.Flags().StringVar(&req.Endpoint, "endpoint", "", "HOST[:PORT] by which the peer reaches the agent's UDP port (default: the pod's address)")
	cmd.Flags().BoolVar(&req.NodePort, "nodeport", false, "make a NodePort Service and use the agent's node as the endpoint")
	cmd.Flags().BoolVar(&qr, "qr", false, "also show the configuration as a QR code, on the terminal (stderr)")
	complete(cmd, "public-key", fixedCompletion())
	complete(cmd, "endpoint", fixedCompletion())
	return cmd
}

func (a *app) addPeer(ctx context.Context, req api.PeerRequest, qr bool) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt)
	defer stop()
	client := api.New(a.socket)
	c, err := client.PeerAdd(ctx, req)
	if err != nil {
		return err
	}
	text := peerText(c)
	if a.json() {
		return a.printIndented(struct {
			api.PeerConfig
			Config string `json:"config"` // for wg-quick
		}{c, text})
	}
	fmt.Fprint(a.out, text)
	if qr {
		return printQR(a.err, text)
	}
	return nil
}

func (a *app) peerListCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the peers",
		Long: `List shows a session's peers. A stale one was added to an agent that is gone: its
configuration is of no more use, and "peer remove" forgets it.`,
		Example: examples(a.name, `
culvert peer list
culvert peer list -o json`),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt)
			defer stop()
			peers, err := api.New(a.socket).Peers(ctx, api.PeerRequest{Context: a.context})
			if err != nil {
				return err
			}
			if a.json() {
				return a.printIndented(peers)
			}
			a.printPeers(peers, time.Now())
			return nil
		},
	}
}

func (a *app) printPeers(peers []api.Peer, now time.Time) {
	if len(peers) == 0 {
		fmt.Fprintf(a.out, "No peers. `%s peer add NAME` adds one.\n", a.name)
		return
	}
	t := newTable(a.out)
	t.row("NAME", "STATE", "ADDRESS", "ADDED", "HANDSHAKE", "FROM", "SENT", "RECEIVED")
	for _, p := range peers {
		address := "-"
		if len(p.Addresses) > 0 {
			address = p.Addresses[0].String()
		}
		row := []string{p.Name, peerState(p, now), address, took(now.Sub(p.Added)) + " ago", "never", or(p.From, "-"), bytesText(p.Sent), bytesText(p.Received)}
		if !p.LastHandshake.IsZero() {
			row[4] = took(now.Sub(p.LastHandshake)) + " ago"
		}
		t.row(row...)
	}
	t.flush()
}

// handshakeLife is how long WireGuard goes on after a handshake: a peer that is
// there makes another one before.
const handshakeLife = 3 * time.Minute

func peerState(p api.Peer, now time.Time) string {
	switch {
	case p.Stale:
		return "stale"
	case p.LastHandshake.IsZero() || now.Sub(p.LastHandshake) > handshakeLife:
		return "away"
	}
	return "connected"
}

func (a *app) peerRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "remove NAME",
		Aliases: []string{"rm"},
		Short:   "Remove a peer",
		Long:    `Remove ends a peer and its connections at once, and forgets a stale one.`,
		Example: examples(a.name, `
culvert peer remove phone`),
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completePeers,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt)
			defer stop()
			p, err := api.New(a.socket).PeerRemove(ctx, api.PeerRequest{Context: a.context, Name: args[0]})
			if err != nil {
				return err
			}
			if a.json() {
				return a.printIndented(p)
			}
			fmt.Fprintf(a.out, "Removed peer %s.\n", printable(p.Name))
			return nil
		},
	}
}

// completePeers offers the names of peers.
func (a *app) completePeers(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), completionTimeout)
	defer cancel()
	peers, err := api.New(a.socket).Peers(ctx, api.PeerRequest{Context: a.context})
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, p := range peers {
		names = append(names, p.Name)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// printIndented writes JSON for people and programs.
func (a *app) printIndented(v any) error {
	enc := json.NewEncoder(a.out)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}
