//! Decisions played through in virtual time, with seeds.

mod link;
mod nat;
