package main

import (
	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/session"
)

// sessionCommand is the process that the daemon starts for one cluster. Its
// reason to end has been told to the daemon; stderr is the session's log.
func (a *app) sessionCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "session",
		Short:  "The process of one connected cluster; culvertd starts it",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE:   func(cmd *cobra.Command, _ []string) error { return session.Run(cmd.Context()) },
	}
}
